"""Measures, significance tests, reports with latency and storage."""
