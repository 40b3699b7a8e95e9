"""Reranking by MaxSim: see `tct_hf.evaluation.maxsim`."""

from tct_hf.evaluation.maxsim import rerank_run as rerank_run
