"""Tests: each name is a sentence of the promise that it checks."""
