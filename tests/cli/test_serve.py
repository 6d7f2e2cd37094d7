"""What `gpt serve` lets in is written as browsers write it."""

import pytest

from cli.serve import origin
from engine.errors import InputError


@pytest.mark.parametrize(
    ("site", "sent"),
    [
        ("https://a.example", "https://a.example"),
        ("HTTPS://A.example:443/", "https://a.example"),
        ("http://localhost:3000/", "http://localhost:3000"),
        ("http://[::1]:80", "http://[::1]"),
        ("*", "*"),
    ],
)
def test_a_site_is_named_as_browsers_name_it(site: str, sent: str) -> None:
    assert origin(site) == sent


@pytest.mark.parametrize(
    "site",
    [
        *(
            "nonsense",
            "a.example",
            "null",
            "https://",
            "https://a.example/page",
            "https://a.example?x",
            "ftp://a.example",
        ),
        *(
            "https://user@a.example",
            "https://a.example:port",
            "https://a.example:99999",
            "https://\u00e4.example",
            "//a",
            "[",
        ),
        *("https://*.example", "https://a example"),
    ],
)
def test_what_no_browser_sends_is_no_site(site: str) -> None:
    with pytest.raises(InputError, match="--cors is"):
        origin(site)
