"""How the tasks ask, without PyTorch: the processes that make training text of the same kind import it, too.

Source: RULER, arXiv 2404.06654, section 3.
"""

from __future__ import annotations

NEEDLES_BEFORE = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n"
)
NEEDLES_AFTER = (
    "What are all the special magic numbers for {keys} mentioned in the provided text? The special magic numbers for "
    "{keys} mentioned in the provided text are"
)
VARIABLES_BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
VARIABLES_AFTER = (
    "Question: Find all variables that are assigned the value {value} in the text above.\nAnswer: According to the "
    "chain(s) of variable assignment in the text above, {hops} variables are assigned the value {value}, they are:"
)
WORDS_BEFORE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
WORDS_AFTER = (
    "\nQuestion: What are the 10 most common words in the above list?\nAnswer: The top 10 words that appear most often "
    "in the list are:"
)
QA_BEFORE = (
    "Answer the question based on the given text. Only give me the answer and do not output any other words.\n\n"
    "The following is the given text.\n"
)
QA_AFTER = (
    "\nAnswer the question based on the given text. Only give me the answer and do not output any other words.\n\n"
    "Question: In which city does {person} work?\nAnswer:"
)
SYLLABLES = ("bar", "cel", "dor", "fen", "gal", "hol", "kor", "lin", "mar", "nor", "pel", "ros", "sil", "tam", "vel")
