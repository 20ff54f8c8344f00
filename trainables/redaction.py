"""Takes secrets out of what leaves the process: out of URIs, and out of text in which they may
stand.

A password has many places in a URI: `user:password@`, a token alone before the `@`, the keys of a
bucket, `?password=` and its kin. Whatever is printed, recorded or sent goes through here, and
nothing else decides what a secret is.
"""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
"""What stands in the place of a secret in text that people read."""

_SECRET_NAME = re.compile(
    r".*(?:password|passwd|passphrase)|"
    r"(?:.*[\W_])?(?:pass|pwd|secret|token|credentials?|signature|sig|sas|auth|authorization|"
    r"(?:api|access|account|secret|private|shared)[\W_]?key(?:[\W_]?id)?)"
)
# Bounded, since a name of any length would be looked for from each of its letters: long text would
# take the square of its length.
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,40})://(\S*)")
_WHOLE_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_ASSIGNMENT = re.compile(r"([\w.-]{1,60})(\s?=\s?)(\"[^\"]*\"|'[^']*'|[^\s,;&)'\"]+)")
_PARAMETER = re.compile(r"([?&;#])([^=&;#?]+)=([^&;#]*)")
_INNER_NAME = re.compile(r"([\w.-]{1,60})=")
_BETWEEN_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=AWS)(?=[A-Z][a-z])")
_AUTHORITY_END = re.compile(r"[/?#]")
_NAMELESS = ("s3", "s3a", "s3n", "gs", "gcs", "http", "https", "ws", "wss")
"""Schemes where what stands alone before the `@` is a key or a token; in those of databases it is a
user's name."""
_BUCKETS = ("s3", "s3a", "s3n", "gs", "gcs")
"""Schemes whose keys are both secret, and whose secret keys have slashes."""


Match = re.Match[str]


def without_secrets(uri: str) -> str:
    """A URI that can still be used where its secrets come from elsewhere.

    `postgresql://anna:secret@host/db` becomes `postgresql://anna@host/db`.
    """
    whole = _WHOLE_URI.fullmatch(uri)
    if whole is None:
        return uri
    scheme, rest = whole.groups()
    return _cleaned(scheme, rest, "")


def redact(text: str, *, names: bool = False) -> str:
    """Text with `***` for each secret in it.

    Args:
        names: leave what stands alone before the `@` of a web address: in what went through here
            before, it is a user's name.
    """

    def cleaned(uri: Match) -> str:
        scheme, rest = uri.groups()
        return _cleaned(scheme, rest, HIDDEN, names)

    whole = _WHOLE_URI.fullmatch(text)
    is_one_uri = text.count("://") == 1
    if whole and is_one_uri:
        # Even blanks belong to it.
        return cleaned(whole)
    text = _URI.sub(cleaned, text)
    return _ASSIGNMENT.sub(_assignment, text)


def _assignment(match: Match) -> str:
    text = match[0]
    name, equals, _ = match.groups()
    has_uri = "://" in text
    if has_uri or not is_secret_name(name):
        return text
    return f"{name}{equals}{HIDDEN}"


def redact_values(value: Any, key: str = "") -> Any:
    """Plain data with `***` for each secret: in its texts, and whole where a key such as `password`
    says what it is."""
    if isinstance(value, Mapping):
        redacted = {}
        for name, item in value.items():
            redacted[name] = redact_values(item, str(name))
        return redacted
    if isinstance(value, list | tuple):
        return [redact_values(item, key) for item in value]
    if isinstance(value, str):
        if value and is_secret_name(key):
            return HIDDEN
        return redact(value)
    return value


def is_secret_name(name: str) -> bool:
    """Whether a value of that name is a secret."""
    lower = name.lower()
    if _SECRET_NAME.fullmatch(lower):
        return True
    words = _BETWEEN_WORDS.sub("_", name)
    lower_words = words.lower()
    return _SECRET_NAME.fullmatch(lower_words) is not None


def _cleaned(scheme: str, rest: str, hidden: str, names: bool = False) -> str:
    """A URI, with `hidden` for its secrets, or without them if it is empty."""
    scheme_name = scheme.lower()
    if scheme_name.endswith(("+http", "+https")):
        _, _, scheme_name = scheme_name.rpartition("+")
    login, rest = _login(scheme_name, rest)
    shown = ""
    if login:
        shown = _shown_login(scheme_name, login, hidden, names)
    at = ""
    if shown:
        at = f"{shown}@"
    rest = _PARAMETER.sub(lambda match: _parameter(match, hidden), rest)
    if not hidden and "?" not in rest:
        # The first parameter went, with its mark.
        rest = rest.replace("&", "?", 1)
    return f"{scheme}://{at}{rest}"


def _shown_login(scheme: str, login: str, hidden: str, names: bool) -> str:
    """What is left of a login, which is the user's name at most."""
    user, colon, password = login.partition(":")
    if not colon:
        is_token = scheme in _NAMELESS and not names
        if is_token:
            return hidden
        return user
    # The key of a bucket, or a token in the place of a user.
    is_secret = scheme in _BUCKETS or password in ("", "x-oauth-basic")
    if is_secret or not user:
        return hidden
    if hidden:
        return f"{user}:{hidden}"
    return user


def _login(scheme: str, rest: str) -> tuple[str, str]:
    """What stands before the `@` that ends the login, and what follows it; a password may have any
    character, unquoted."""
    authority, *_ = _AUTHORITY_END.split(rest, maxsplit=1)
    if "@" in authority:
        login, _, _ = authority.rpartition("@")
        after_login = len(login) + 1
        return login, rest[after_login:]
    if "@" not in rest:
        return "", rest
    _, colon, after = authority.rpartition(":")
    if not colon:
        return "", rest
    ends_in_port = after.isdigit() or authority.endswith("]")
    if ends_in_port and scheme not in _BUCKETS:
        return "", rest
    login, _, rest = rest.rpartition("@")
    return login, rest


def _parameter(match: Match, hidden: str) -> str:
    mark, name, value = match.groups()
    inside = unquote(value)
    inner_names = _INNER_NAME.findall(inside)
    names = [unquote(name), *inner_names]
    secret = any(map(is_secret_name, names))
    is_hidden = value.startswith(HIDDEN)
    if is_hidden or not secret:
        return match[0]
    if hidden:
        return f"{mark}{name}={hidden}"
    return ""
