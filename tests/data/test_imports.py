from __future__ import annotations

import subprocess
import sys


def test_importing_the_modules_loads_nothing_heavy() -> None:
    code = (
        "import sys, tct_hf.data, tct_hf.data.builtin, tct_hf.data.beir, tct_hf.pipeline.passage_ranking, "
        "tct_hf.retrieval.negatives, "
        "tct_hf.retrieval.bm25, tct_hf.retrieval.dense, tct_hf.retrieval.runs, tct_hf.evaluation.measures\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'accelerate'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
