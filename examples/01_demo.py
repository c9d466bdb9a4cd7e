"""The main job from end to end on the bundled sample model: calibrate, build, generate from an 8k-token prompt.

Runs the commands that a user would type, and prints them. Everything is written to out/demo.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from fasa_trt.calibrate.recall import recall_document

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("examples") / "models" / "fasa-tiny"
OUT = Path("out") / "demo"
CONTEXT = 8000  # tokens; the sample model was trained on 8192


def run(*arguments: str | Path) -> str:
    """Runs one fasa-trt command from the repository's root and returns what it printed."""
    print("\n$ fasa-trt " + " ".join(repr(a) if "\n" in str(a) else str(a) for a in arguments), flush=True)
    command = [sys.executable, "-m", "fasa_trt.cli.main", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def main() -> None:
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / MODEL)
    document = recall_document(
        lambda text: tokenizer(text, add_special_tokens=False).input_ids, length=CONTEXT, notes=33, seed=2026
    )
    question = document.questions[0]
    (ROOT / OUT / "prompt.txt").write_text(document.text + question.prompt, "utf-8", newline="\n")

    profile, engine = OUT / "profile.safetensors", OUT / "engine"
    quick = ("--samples", "4", "--length", "4096")  # a third of the default's time, nearly the same choice
    run("calibrate", "--model", MODEL, "-o", profile, "--report", OUT / "report", "--force", *quick)
    run("build", "--model", MODEL, "--profile", profile, "--budget", "256", "-o", engine, "--force")
    print(
        f"\nThe prompt: {document.token_count} tokens of Python source with 33 lines like "
        f"'# note {question.key} = ...' in it, and at its end '{question.prompt}'. The answer is {question.answer}."
    )
    answer: list[str | Path] = ["generate", engine, "--prompt-file", OUT / "prompt.txt", "-n", "8", "--stop", "\n"]
    sparse = run(*answer).strip()
    dense = run(*answer, "--dense").strip()
    print(f"\nexpected {question.answer}, FASA with 256 tokens {sparse}, dense {dense}")
    run("generate", engine, "--prompt", "def fibonacci(n):\n", "-n", "48")
    if sparse != question.answer:
        sys.exit("the demo's answer is wrong")


if __name__ == "__main__":
    main()
