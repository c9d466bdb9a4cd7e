"""What sparse decoding costs in quality: tasks, FASA and its peers at equal budget, over the same dense prefill.

A *task* makes documents and questions and scores answers. A *method* says which cached tokens a decode step attends
to. `run.py` crosses them, `results.py` keeps what came out.
"""
