"""Keys, hosts and origins in the form of requests, and what no request can have."""

import pytest

from ramgguf.core.errors import EngineError
from ramgguf.deploy.access import normal_host, normal_key, normal_origin
from ramgguf.deploy.serving import Place


def test_a_key_is_what_a_header_can_have() -> None:
    assert normal_key(" the right one\n") == "the right one"
    for key in ("", " \n", "a\nb", "schl\u00fcssel"):
        with pytest.raises(EngineError, match="the key of --api-key or RAMGGUF_API_KEY"):
            normal_key(key)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("*", "*"), ("LLM.example ", "llm.example"), ("*.example.org", "*.example.org"),
        ("a_b-1", "a_b-1"), ("10.0.0.1", "10.0.0.1"), ("::5", "[::5]"), ("[::5]", "[::5]"),
    ],
)  # fmt: skip
def test_a_host_is_what_its_header_has_without_a_port(text: str, host: str) -> None:
    assert normal_host(text) == host


@pytest.mark.parametrize(
    "text", ["a*b", "*x", "a.*", "", "x.org:80", "https://x.org", "x.org/", "m\u00fcnchen", "a b"]
)
def test_a_host_that_no_request_has_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match="is no host; give a name"):
        normal_host(text)


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("*", "*"), ("null", "null"), ("https://x.org/", "https://x.org"),
        ("HTTPS://X.org", "https://x.org"), ("https://x.org:443", "https://x.org"),
        ("http://x.org:443", "http://x.org:443"), ("http://[::5]:3000", "http://[::5]:3000"),
        ("chrome-extension://abc", "chrome-extension://abc"),
    ],
)  # fmt: skip
def test_an_origin_is_what_browsers_send(text: str, origin: str) -> None:
    assert normal_origin(text) == origin


@pytest.mark.parametrize(
    "text",
    ["", "x.org", "https://", "https://x.org/page", "https://x.org?q", "https://a@x.org",
     "https://*.x.org", "https://x.org:port", "http://[", "https://m\u00fcnchen"],
)  # fmt: skip
def test_an_origin_that_no_browser_sends_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match="is no origin; give https"):
        normal_origin(text)


def test_a_place_has_hosts_and_origins_as_requests_have_them() -> None:
    place = Place(host="fe80::1", api_key="k\n", hosts=("::5",), origins=("https://x.org/",))
    limits = place.limits(256)
    assert place.api_key == "k"
    assert {"[fe80::1]", "[::5]", "localhost"} < set(limits.hosts)
    assert limits.origins == ("https://x.org",)
