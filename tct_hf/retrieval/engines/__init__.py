"""Engines that other people run, filled with what encode has written."""
