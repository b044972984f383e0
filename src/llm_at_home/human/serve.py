"""``python -m llm_at_home.human.serve RUN ...``: a page on which people grade answers blind, behind ``make rate``."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Sequence

from llm_at_home.errors import Refusal
from llm_at_home.human import links
from llm_at_home.human.runs import read_material
from llm_at_home.human.study import DATABASE, Study

DEFAULT_FOLDER = "multirun/study"
DEFAULT_RATERS = 8
DEFAULT_PORT = 8800
LOOPBACK = "127.0.0.1"
# Kept for documentation by RFC 5737; asking for the way there sends nothing.
_ELSEWHERE = ("192.0.2.1", 9)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C; 0 then, 2 when there is nothing to serve or nowhere to serve it."""
    arguments = _parser().parse_args(argv)
    try:
        study = _study(arguments)
        try:
            _serve(study, arguments)
        finally:
            study.close()
    except Refusal as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llm_at_home.human.serve", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders with answers.jsonl; none: go on with STUDY")
    parser.add_argument("--study", default=DEFAULT_FOLDER, help="where grades are kept (default: %(default)s)")
    parser.add_argument("--raters", type=int, help=f"how many get a link (default: {DEFAULT_RATERS})")
    parser.add_argument("--questions", help="home_bench, mt_bench or a file; default: what the runs' records name")
    parser.add_argument("--ids", type=_ids, help="show these questions: 81,103,119,143,158 are the paper's")
    parser.add_argument("--limit", type=int, help="show the first N questions")
    parser.add_argument("--seed", type=int, help="of the raters' orders (default: 0)")
    parser.add_argument("--host", default=LOOPBACK, help="the address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0: a free one (default: %(default)s)")
    parser.add_argument("--url", help="what the links begin with, where a proxy stands before this server")
    return parser


def _ids(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _study(arguments: argparse.Namespace) -> Study:
    """The study in the folder, begun now if there is none.

    Raises:
        Refusal: when the folder holds another study than the one that is asked for.
    """
    if arguments.limit is not None and arguments.limit < 1:
        raise Refusal(f"--limit {arguments.limit} leaves no question: give at least 1")
    there = os.path.isfile(os.path.join(arguments.study, DATABASE))
    if not there:
        if not arguments.runs:
            raise Refusal(f'{arguments.study} holds no study yet: name the runs, make rate RUNS="FOLDER FOLDER"')
        material = read_material(arguments.runs, arguments.questions, arguments.ids, arguments.limit)
        raters = DEFAULT_RATERS if arguments.raters is None else arguments.raters
        return Study.begin(arguments.study, material, raters, arguments.seed or 0)
    study = Study(arguments.study)
    try:
        _go_on(study, arguments)
    except BaseException:
        study.close()
        raise
    return study


def _go_on(study: Study, arguments: argparse.Namespace) -> None:
    another = "name another folder with --study (STUDY=), or leave these out to go on with this one"
    if arguments.seed not in (None, study.seed):
        raise Refusal(f"the study in {arguments.study} has the seed {study.seed}: {another}")
    if arguments.runs:
        material = read_material(arguments.runs, arguments.questions, arguments.ids, arguments.limit)
        if material.fingerprint() != study.fingerprint:
            raise Refusal(f"the study in {arguments.study} is of other answers or questions: {another}")
    elif arguments.questions or arguments.ids or arguments.limit:
        raise Refusal(f"the questions of the study in {arguments.study} are chosen already: {another}")
    if arguments.raters is not None:
        if arguments.raters < study.raters:
            raise Refusal(f"the study in {arguments.study} has {study.raters} raters: there can be more and not fewer")
        study.add_raters(arguments.raters)


def _serve(study: Study, arguments: argparse.Namespace) -> None:
    import uvicorn

    from llm_at_home.human.web import make_app

    with _listen(arguments.host, arguments.port) as listener:
        address = arguments.url or f"http://{_reachable(arguments.host)}:{listener.getsockname()[1]}"
        print(_announcement(study, arguments, address.rstrip("/")), flush=True)
        logging.basicConfig(format="%(message)s")
        # No access log: a link's secret is in its address. No log configuration of uvicorn's own either.
        config = uvicorn.Config(
            make_app(study), access_log=False, log_config=None, server_header=False, timeout_graceful_shutdown=5
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    graded = sum(row.grade is not None for row in study.grades())
    print(f"stopped with {graded} grades; the same command goes on, make study STUDY={arguments.study} counts")


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        Refusal: when the address is none of this machine's, or taken.
    """
    if not 0 <= port < 65536:  # the C library would take the rest of a division
        raise Refusal(f"--port {port}: a port is from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise Refusal(f"--host {host} --port {port} is no address to listen on: {error}") from None
    try:
        # A server that was killed leaves connections behind, which must not keep its successor from the port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        hint = f"{error.strerror or error}; choose another with --host or --port"
        raise Refusal(f"cannot listen on {host}, port {port}: {hint}") from None
    return listener


def _announcement(study: Study, arguments: argparse.Namespace, address: str) -> str:
    models, questions = len(study.models()), len(study.questions())
    lines = [f"{models} models, {questions} questions: {models * questions} answers for each of {study.raters} raters"]
    if study.left_out:
        lines.append(f"left out: {study.left_out} questions that not every run has a whole answer to")
    for rater in range(1, study.raters + 1):
        done = sum(item.grade is not None for item in study.items(rater))
        link = f"{address}/r/{links.link_token(study.secret, rater)}/"
        lines.append(f"rater {rater:2}  {link}  {done} of {models * questions} graded")
    lines.append("Each link is secret: who has it grades as this rater. The page does not say which model wrote what.")
    if _is_loopback(arguments.host):
        lines.append(f"Only this machine reaches {arguments.host}; phones in the same network need --host 0.0.0.0.")
    else:
        lines.append(
            f"WARNING: {arguments.host} is open to the network, and nothing is encrypted: whoever listens there can"
            " read links, answers and grades, and grade with a link. Use a network that you trust, or stay on"
            f" {LOOPBACK} behind a proxy with TLS (--url https://...)."
        )
    lines.append(f"Grades are kept in {study.path}. Ctrl-C stops.")
    return "\n".join(lines)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reachable(host: str) -> str:
    """The host as it stands in a link; for "all addresses", the one that leads out of this machine."""
    if host in ("0.0.0.0", "::", ""):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(_ELSEWHERE)
                return str(probe.getsockname()[0])
            except OSError:
                return socket.gethostname()
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    sys.exit(main())
