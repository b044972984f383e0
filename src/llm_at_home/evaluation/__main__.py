"""``python -m llm_at_home.evaluation``: two runs or two judges against each other, and answers of an API."""

from __future__ import annotations

import argparse
import sys

from llm_at_home.errors import Refusal
from llm_at_home.evaluation.judge.client import JudgeError
from llm_at_home.records import store


def main(argv: list[str] | None = None) -> int:
    """Print what was asked for; exit code 2, with one line, for what cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m llm_at_home.evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    two = commands.add_parser(
        "compare", help="paired differences of two runs of task=fidelity, or of two of task=judge"
    )
    two.add_argument("a", help="a run's folder")
    two.add_argument("b", help="another's; differences are a - b")
    judges = commands.add_parser("agreement", help="how often two judges, or a judge and people, agree")
    for name in ("a", "b"):
        judges.add_argument(name, help="a judge's run folder, a judgments.jsonl, or people's grades as a CSV file")
    api = commands.add_parser("answers", help="a model's answers through an OpenAI-compatible API, as a row to judge")
    api.add_argument("--base-url", required=True, help="http://HOST:PORT/v1")
    api.add_argument("--model", required=True, help="the exact name that the server knows")
    api.add_argument("--out", required=True, help="FILE.jsonl; what is in it already is not asked again")
    api.add_argument("--questions", default="mt_bench", help="mt_bench, home_bench, or a file (default: %(default)s)")
    api.add_argument("--limit", type=int, help="the first N questions")
    api.add_argument("--api-key-env", help="NAME of the environment variable with the key")
    api.add_argument("--max-tokens", type=int, default=1024)
    api.add_argument(
        "--temperature", type=float, help="for all questions; without it the published one of each category"
    )
    api.add_argument("--samples", type=int, default=1)
    arguments = parser.parse_args(argv)
    try:
        {"compare": _compare, "agreement": _agreement, "answers": _answers}[arguments.command](arguments)
    except (Refusal, JudgeError) as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def _compare(arguments: argparse.Namespace) -> None:
    from llm_at_home.evaluation.fidelity import comparison as fidelity
    from llm_at_home.evaluation.judge import comparison as judged

    if store.load(arguments.a).config.get("task") == "judge":
        one, other = judged.JudgedRun.load(arguments.a), judged.JudgedRun.load(arguments.b)
        print(judged.as_text(judged.compare(one, other), judged.is_control(one, other)))
        return
    a, b = fidelity.Run.load(arguments.a), fidelity.Run.load(arguments.b)
    print(fidelity.as_text(a, b, fidelity.compare(a, b)))


def _agreement(arguments: argparse.Namespace) -> None:
    from llm_at_home.evaluation.judge.agreement import agreement, load

    a, b = load(arguments.a), load(arguments.b)
    print(agreement(a, b).as_text(a.name, b.name))


def _answers(arguments: argparse.Namespace) -> None:
    from llm_at_home.evaluation.judge.api_answers import answer

    print(answer(arguments))


if __name__ == "__main__":
    sys.exit(main())
