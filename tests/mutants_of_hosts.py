"""What `tests/mutate.py` breaks of several processes."""

from tests.mutant import of

OF_HOSTS = (
    *of(
        "fjax/_peers.py",
        "tests/test_peers.py",
        (
            "whoever has come to its end is missed",
            "elif said != WELL:",
            "else:",
        ),
        (
            "what is heard is not passed on",
            "if other != number), said)",
            "if other == number), said)",
        ),
        (
            "two of one number",
            "if process in came or not 0 < process < processes:",
            "if not 0 < process < processes:",
        ),
    ),
    *of(
        "fjax/hosts.py",
        "tests/experiments/test_hosts.py",
        (
            "each process keeps what it was given",
            "return bytes(np.asarray(multihost_utils.broadcast_one_to_all(row))).decode()",
            "return text",
        ),
    ),
)
