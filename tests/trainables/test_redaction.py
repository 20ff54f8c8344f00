"""No secret stays in a URI or in text, wherever it stands, and what is no secret does."""

import time

import pytest

from slimfront.trainables.redaction import is_secret_name, redact, redact_values, without_secrets

URIS = [
    ("postgresql://anna:hunter2@host/db", "postgresql://anna@host/db"),
    ("postgresql+psycopg://anna:hunter2@host:5432/db", "postgresql+psycopg://anna@host:5432/db"),
    ("postgresql://anna:hun/ter2@host/db", "postgresql://anna@host/db"),
    ("postgresql://anna:hun#ter2?x@host/db", "postgresql://anna@host/db"),
    ("postgresql://anna:a@hunter2@host/db", "postgresql://anna@host/db"),
    ("postgresql://host/db?user=anna&password=hunter2", "postgresql://host/db?user=anna"),
    ("postgresql://host/db?password=hunter2&user=anna", "postgresql://host/db?user=anna"),
    ("postgresql://host/db?PassWord=hunter2", "postgresql://host/db"),
    ("mysql://host/db?passwd=hunter2", "mysql://host/db"),
    ("mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BUID%3Danna%3BPWD%3Dhunter2", "mssql+pyodbc:///"),
    ("http://me:hunter2@host:1/x", "http://me@host:1/x"),
    ("http://hunter2@host:1/x", "http://host:1/x"),
    ("https://hunter2:x-oauth-basic@host/x", "https://host/x"),
    ("https://hunter2:@host/x", "https://host/x"),
    ("git+https://hunter2@host/x", "git+https://host/x"),
    ("https://host/x?token=hunter2", "https://host/x"),
    ("https://host/x?a=1&access_token=hunter2&b=2", "https://host/x?a=1&b=2"),
    ("https://host/x?api-key=hunter2#y", "https://host/x#y"),
    ("https://host/x#access_token=hunter2", "https://host/x"),
    (
        "https://b.s3.host/x?X-Amz-Signature=hunter2&X-Amz-Credential=hunter2&X-Amz-Security-Token=hunter2",
        "https://b.s3.host/x",
    ),
    ("https://a.blob.host/x?sv=2020&sig=hunter2", "https://a.blob.host/x?sv=2020"),
    ("s3://KEYhunter2:hunter2@bucket/searches?region=x", "s3://bucket/searches?region=x"),
    ("s3://KEYhunter2:hun/ter2@bucket/searches", "s3://bucket/searches"),
    ("s3://KEYhunter2@bucket/searches", "s3://bucket/searches"),
    ("s3://bucket/x?secret_key=hunter2&scheme=http", "s3://bucket/x?scheme=http"),
    ("redis://:hunter2@host/0", "redis://host/0"),
]

HARMLESS = [
    "sqlite:////home/a@b/slimfront.db",
    "sqlite:///slimfront.db",
    "http://host:5000/a@b",
    "http://[::1]:5000/x@y",
    "postgresql://anna@host/db?sslmode=require",
    "s3://bucket/searches?endpoint_override=host:9000&scheme=http",
    "abfss://container@account.host/x",
    "https://host/x?author=me&keyword=a&tokens=5&page=2",
    "runs",
    "a@b",
]


@pytest.mark.parametrize(("uri", "expected"), URIS)
def test_a_uri_loses_its_secrets_and_stays_usable(uri: str, expected: str) -> None:
    assert without_secrets(uri) == expected


@pytest.mark.parametrize("uri", [uri for uri, _ in URIS])
def test_text_loses_the_secrets_of_all_its_uris(uri: str) -> None:
    for text in (uri, f"no answer from {uri}, twice", f"{uri} and {uri}", f"Error: '{uri}'"):
        shown = redact(text)
        assert "hunter2" not in shown
        assert "ter2" not in shown
        assert "***" in shown
        assert redact(shown) == shown


@pytest.mark.parametrize("text", HARMLESS)
def test_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    assert without_secrets(text) == text
    assert redact(text) == text


def test_what_is_already_without_secrets_keeps_its_user_where_that_is_asked() -> None:
    assert redact("it is at http://me@host:1 now", names=True) == "it is at http://me@host:1 now"
    assert (
        redact("it is at http://me:hunter2@host:1 now", names=True)
        == "it is at http://me:***@host:1 now"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "connection failed: host=h password=hunter2 user=anna",
            "connection failed: host=h password=*** user=anna",
        ),
        ("AWS_SECRET_ACCESS_KEY=hunter2", "AWS_SECRET_ACCESS_KEY=***"),
        ("api_key = 'hunter2 x'", "api_key = ***"),
        ("--set model.args.token=hunter2", "--set model.args.token=***"),
        ("tokens=5, monkey=3", "tokens=5, monkey=3"),
    ],
)
def test_assignments_in_text_lose_their_secrets(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_secrets_go_from_nested_values_by_what_they_are_and_by_their_names() -> None:
    args = {
        "url": "https://hunter2@host/x",
        "auth": {"password": "hunter2", "user": "anna"},
        "tokens": 5,
        "token": 3,
        "n": [1, None],
    }
    assert redact_values(args) == {
        "url": "https://***@host/x",
        "auth": {"password": "***", "user": "anna"},
        "tokens": 5,
        "token": 3,
        "n": [1, None],
    }


@pytest.mark.parametrize(
    "piece", ["A", "a.", "a=", "=", "a://", "?", "?a=", "@", ":", "http://u:p@h ", "%3d", "' "]
)
def test_long_text_takes_no_long_time(piece: str) -> None:
    began = time.monotonic()
    for text in (piece * 10_000, f"http://{piece * 10_000}", f"http://h?x={piece * 10_000}"):
        redact(text)
        without_secrets(text)
    assert time.monotonic() - began < 2


def test_names_of_secrets_are_known() -> None:
    names = [
        "password",
        "PGPASSWORD",
        "db.password",
        "hf_token",
        "apiKey",
        "AWSAccessKeyId",
        "sslpassword",
        "client_secret",
    ]
    assert [name for name in names if not is_secret_name(name)] == []
    harmless = [
        "tokens",
        "monkey",
        "key",
        "author",
        "compass",
        "sparsity",
        "passes",
        "design",
        "training.seed",
        "tokenizer",
    ]
    assert [name for name in harmless if is_secret_name(name)] == []
