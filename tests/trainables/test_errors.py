"""How messages are kept short."""

from slimfront.trainables.errors import first_line, first_line_of


def test_the_first_line_that_says_something_comes_without_the_colours_of_a_terminal() -> None:
    text = "\n \x1b[96mThis is step 2/3\x1b[0m of exporting.\nNext steps:"
    assert first_line_of(text) == "This is step 2/3 of exporting."
    assert first_line_of("\x1b[1;31m\x1b[0m\nit") == "it"
    assert first_line(ValueError("")) == "ValueError"
