"""How messages are kept short."""

from slimfront.trainables.errors import first_line, first_line_of


def test_the_first_line_that_says_something_comes_without_the_colours_of_a_terminal() -> None:
    text = "\n \x1b[96mThis is step 2/3\x1b[0m of exporting.\nNext steps:"
    assert first_line_of(text) == "This is step 2/3 of exporting."
    assert first_line_of("\x1b[1;31m\x1b[0m\nit") == "it"
    assert first_line(ValueError("")) == "ValueError"


def test_a_key_that_is_missing_is_no_reason_without_the_kind_of_the_error() -> None:
    assert first_line(KeyError(101)) == "KeyError: 101"
    assert first_line(KeyError("width")) == "'width'"
