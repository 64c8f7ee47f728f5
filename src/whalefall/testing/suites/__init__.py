"""Conformance suites: classes of tests to subclass with fixtures of your own; they need pytest."""
