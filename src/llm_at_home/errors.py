"""The ways in which a job ends early on purpose."""


class Refusal(Exception):
    """A combination or an input that cannot work; the message says in one line what to change. Exit code 2."""


class Interrupted(Exception):
    """The job was asked to stop (Ctrl-C, SIGTERM) and has put its work in order first."""
