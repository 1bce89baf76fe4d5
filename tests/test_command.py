"""What a user can mend ends a command in one sentence; a mistake in the program does not hide in one."""

import pytest

from ijepa_fast.command import one_sentence


def command(error, **options):
    @one_sentence(**options)
    def main(argv):
        if error is not None:
            raise error
        return len(argv or ())

    return main


@pytest.mark.parametrize("error", [ValueError("a: expected b"), ImportError("no c"), FileNotFoundError(2, "none", "d")])
def test_an_error_is_a_sentence(error, capsys):
    assert command(error)([]) == 1
    assert capsys.readouterr() == ("", f"error: {error}\n")
    assert command(error, status=2)() == 2


def test_the_status_of_a_good_end_is_the_commands_own(capsys):
    assert command(None)() == 0
    assert command(None)(["one", "two"]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [KeyError("e"), RuntimeError("f"), KeyboardInterrupt()], ids=repr)
def test_other_errors_are_raised(error):
    with pytest.raises(type(error)):
        command(error)([])


def test_the_traceback_can_be_had(monkeypatch):
    monkeypatch.setenv("IJEPA_FAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="expected b"):
        command(ValueError("a: expected b"))([])
