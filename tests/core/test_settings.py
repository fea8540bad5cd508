"""What the environment says, and the one thing that qtool puts into it."""

from qtool.settings import SPIN_COUNT, share_the_machine


def test_waiting_threads_sleep_unless_the_user_says_otherwise() -> None:
    plain: dict[str, str] = {}
    share_the_machine(plain)
    assert plain == {"GOMP_SPINCOUNT": SPIN_COUNT}
    for own in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        kept = dict(own)
        share_the_machine(kept)
        assert kept == own
