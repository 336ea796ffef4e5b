"""Addresses as people type them."""

from __future__ import annotations

import pytest

from glmchat.chat.client.endpoint import Endpoint
from glmchat.core.errors import Usage
from glmchat.core.servers import api_url


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("gpu-box:8000", "http://gpu-box:8000/v1"),
        ("http://gpu-box:8000", "http://gpu-box:8000/v1"),
        ("http://gpu-box:8000/", "http://gpu-box:8000/v1"),
        ("http://gpu-box:8000/v1", "http://gpu-box:8000/v1"),
        ("http://gpu-box:8000/v1/", "http://gpu-box:8000/v1"),
        ("http://gpu-box:8000/v1/chat/completions", "http://gpu-box:8000/v1"),
        (" https://h/v1/models ", "https://h/v1"),
        ("https://h/proxy", "https://h/proxy/v1"),
        ("https://dashscope.example/compatible-mode/v1", "https://dashscope.example/compatible-mode/v1"),
        ("https://ark.example/api/v3", "https://ark.example/api/v3"),
        ("https://g.example/v1beta/openai", "https://g.example/v1beta/openai/v1"),
        ("[::1]:8000", "http://[::1]:8000/v1"),
        ("http://h/v1?x=1#y", "http://h/v1"),
    ],
)
def test_an_address_is_completed(typed: str, meant: str) -> None:
    assert api_url(typed) == meant


@pytest.mark.parametrize(
    "typed", ["", "http://", "ftp://h", "http://h:99999", "http://h:0", "unix:///s", "http://a b", "http://[::1"]
)
def test_what_is_no_address_is_refused_with_an_example(typed: str) -> None:
    with pytest.raises(Usage) as refused:
        api_url(typed)
    assert "http://gpu-box:8000/v1" in refused.value.hint


def test_an_endpoint_is_a_url_or_a_socket() -> None:
    for wrong in ({}, {"base_url": "h", "uds": "/s"}):
        with pytest.raises(Usage):
            Endpoint(**wrong)
