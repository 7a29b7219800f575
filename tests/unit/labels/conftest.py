"""Fixtures of the tests of labels."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Files are synced after each label, which takes seconds on a busy disk; that they are is tested where it is."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
