"""The loss over a student: its embeddings, gradient caching, slices, its report, its settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim
from torch import Tensor

from tct_hf import TeacherTargets, TightlyCoupledLoss, build_student
from tct_hf import batches as batching
from tct_hf.batches import stack_columns, take, token_lengths
from tests.models import tiny_bert
from tests.train_helpers import numpy_loss, triples

QUERIES = ["what is dense", "the teacher", "tokens", "student of a query", "of the passage", "retrieval", "distilled"]


def passages(column: int) -> list[str]:
    return [" ".join(["the passage of tokens"] * (1 + (3 * i + column) % 5)) + f" {i} {column}" for i in range(7)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("student"), seed=11)


@pytest.fixture
def student(base: Path) -> SentenceTransformer:
    return build_student(str(base), encoding="tct", document_length=64).train()


def features(student: SentenceTransformer, negatives: int) -> list[dict[str, Any]]:
    columns = [(QUERIES, "query"), *((passages(column), "document") for column in range(1 + negatives))]
    return [student.preprocess(texts, prompt=student.prompts[task], task=task) for texts, task in columns]


def targets(negatives: int, *, seed: int = 0) -> TeacherTargets:
    generator = torch.Generator().manual_seed(seed)
    shape = (7, 7 * (1 + negatives))
    mask = torch.rand(shape, generator=generator) < 0.8
    mask.fill_diagonal_(True)
    index = torch.arange(7)
    index[2] = -1
    return TeacherTargets(scores=torch.randn(shape, generator=generator) * 3, mask=mask, positive_index=index)


def total(loss: dict[str, Tensor] | Tensor) -> Tensor:
    return torch.stack(list(loss.values())).sum() if isinstance(loss, dict) else loss


def gradients(student: SentenceTransformer, loss: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def expected_loss(
    student: SentenceTransformer, negatives: int, labels: TeacherTargets, dims: list[int], scale: float | None = None
) -> np.ndarray:
    """Both parts, means over first dimensions, of texts encoded anew: dot products, or cosines times `scale`."""
    queries = student.encode_query(QUERIES).astype(np.float64)
    documents = [student.encode_document(passages(column)) for column in range(1 + negatives)]
    given: dict[str, Any] = {"temperature": 0.7, "student_temperature": 1.5, "weight": 0.3}
    given |= {"mask": labels.mask.numpy(), "positive": labels.positive_index.tolist()}
    parts = []
    for d in dims:
        q, p = queries[:, :d], np.concatenate(documents)[:, :d].astype(np.float64)
        if scale is not None:
            q, p = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (q, p))
        parts.append(numpy_loss((scale or 1.0) * q @ p.T, labels.scores.numpy(), **given))
    return np.mean(parts, axis=0)


@pytest.mark.parametrize("padding", [0, 40])
def test_passes_change_neither_loss_nor_gradients(
    student: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, padding: int
) -> None:
    loss = TightlyCoupledLoss(student, temperature=0.7)
    widths: list[int] = []
    hook = student.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0]["input_ids"].shape[1]))
    results = []
    for limit in (10**9, padding):
        monkeypatch.setattr(batching, "CPU_PADDING", limit)
        widths.clear()
        value = total(loss(features(student, 2), targets(2)))
        results.append((value.item(), gradients(student, value), len(widths)))
    hook.remove()
    (whole, whole_gradients, one_pass), (value, found, many) = results
    assert one_pass == 2 < many  # queries, passages
    assert value == pytest.approx(whole, abs=1e-6)
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("similarity", "negatives", "dims"),
    [("dot", 0, None), ("dot", 3, None), ("dot", 1, [32, 4, 16]), ("cosine", 1, None), ("cosine", 1, [8, 32])],
)
def test_the_columns_are_compared_in_order_as_the_student_compares_at_every_size(
    base: Path, student: SentenceTransformer, similarity: str, negatives: int, dims: list[int] | None
) -> None:
    settings: dict[str, Any] = {"temperature": 0.7, "student_temperature": 1.5, "hard_label_weight": 0.3}
    if similarity == "cosine":
        student = embedding_model(base, similarity=similarity)
        settings["student_scale"] = 5.0
    labels = targets(negatives)
    loss = TightlyCoupledLoss(student, matryoshka_dims=dims, **settings)
    parts = loss(features(student, negatives), labels)
    assert list(parts) == ["hard_label", "distillation"]
    wanted = expected_loss(student, negatives, labels, dims or [32], settings.get("student_scale"))
    assert [part.item() for part in parts.values()] == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_report_holds_the_parts_the_entropy_and_the_agreement(student: SentenceTransformer) -> None:
    """Two queries, four candidates. The student's scores are (2, 0, 0, 1) and (0, 1, 3, 0); row 1 masks the third."""
    columns = [torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 3.0], [1.0, 0.0]])]
    labels = TeacherTargets(
        scores=torch.tensor([[0.0, 0.0, 0.0, 2 * math.log(3)], [0.0, 0.0, 9.0, -1e9]]),
        mask=torch.tensor([[True, True, True, True], [True, True, False, True]]),
        positive_index=torch.tensor([0, -1]),
    )
    loss = TightlyCoupledLoss(student, temperature=2.0, hard_label_weight=0.5)
    parts, report = loss.compute_loss_from_embeddings([torch.eye(2), *columns], labels), labels.report
    assert set(report) == {"hard_label", "distillation", "teacher_entropy", "top_agreement"}
    assert not any(value.requires_grad for value in report.values())
    hard = math.log(math.exp(2) + 2 + math.e) - 2
    assert report["hard_label"].item() == parts["hard_label"].item() == pytest.approx(0.5 * hard, rel=1e-6)
    assert report["distillation"].item() == parts["distillation"].item()
    # Row 0: probabilities 1/6, 1/6, 1/6, 1/2. Row 1: 1/2, 1/2, and a third that has underflowed.
    entropy = (0.5 * math.log(6) + 0.5 * math.log(2) + math.log(2)) / 2
    assert report["teacher_entropy"].item() == pytest.approx(entropy, rel=1e-6)
    # Row 0: student's top is 0, the teacher's is 3. Row 1: 1 and (a tie of 0 and 1, first) 0.
    assert report["top_agreement"].item() == 0.0


def test_scores_are_float32_under_autocast(student: SentenceTransformer) -> None:
    vectors = [torch.randn(7, 32) * 5 for _ in range(3)]
    loss = TightlyCoupledLoss(student, temperature=1.0)
    plain = loss.compute_loss_from_embeddings(vectors, targets(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert loss.compute_loss_from_embeddings(vectors, targets(1)) == plain


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_teacher_scores_of_another_shape_are_refused(
    student: SentenceTransformer, mini_batch_size: int | None
) -> None:
    loss = TightlyCoupledLoss(student, mini_batch_size=mini_batch_size)
    with pytest.raises(ValueError, match=r"\(7, 7\).*\(7, 14\)"):
        loss(features(student, 1), targets(0))


def embedding_model(base: Path, *modules: Any, similarity: str) -> SentenceTransformer:
    bare = SentenceTransformer(str(base), device="cpu")
    return SentenceTransformer(modules=[*bare, *modules], similarity_fn_name=similarity, device="cpu").train()


@pytest.mark.parametrize("mini_batch_size", [None, 3])
@pytest.mark.parametrize(("ends", "similarity"), [([Normalize()], "cosine"), ([Normalize()], "dot"), ([], "cosine")])
def test_hard_labels_alone_are_stocks_ranking_loss_of_cosines_times_20(
    base: Path, ends: list[Any], similarity: str, mini_batch_size: int | None
) -> None:
    student = embedding_model(base, *ends, similarity=similarity)
    columns = features(student, 1)
    stock = MultipleNegativesRankingLoss(student, scale=20.0, similarity_fct=cos_sim)([dict(c) for c in columns], None)
    loss = TightlyCoupledLoss(student, hard_label_weight=1.0, mini_batch_size=mini_batch_size)
    assert loss.get_config_dict()["student_scale"] == 20.0
    shape = (7, 14)
    labels = TeacherTargets(torch.zeros(shape), torch.ones(shape, dtype=torch.bool), torch.arange(7))
    found = total(loss(columns, labels))
    assert found.item() == pytest.approx(stock.item(), abs=1e-5)
    wanted, ours = gradients(student, stock), gradients(student, found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-3)


def test_a_student_of_dot_products_and_a_learned_scale_are_taken_as_they_are(base: Path) -> None:
    scaled = build_student(str(base), encoding="tct", document_length=64, scale=9.0)
    for student in (embedding_model(base, similarity="dot"), scaled):
        assert TightlyCoupledLoss(student).student_scale == 1.0
    with pytest.raises(ValueError, match="33 is not between 1 and the embedding's 32"):
        TightlyCoupledLoss(scaled, matryoshka_dims=[16, 33])


class SameChunks(TightlyCoupledLoss):
    """The same forward passes in the same order, with their graphs kept: what caching must not differ from."""

    def _forward_in_mini_batches(self, features: list[dict[str, Tensor]], labels: TeacherTargets) -> Tensor:
        assert self.mini_batch_size is not None
        merged = stack_columns(features[1:])
        assert merged is not None
        order = torch.tensor(token_lengths(merged)).argsort(stable=True)
        width = merged["attention_mask"].shape[1]
        vectors = []
        for column in (features[0], {key: take(value, order, width) for key, value in merged.items()}):
            lengths = token_lengths(column)
            parts = []
            for start in range(0, len(lengths), self.mini_batch_size):
                rows = torch.arange(start, min(start + self.mini_batch_size, len(lengths)))
                longest = max(lengths[start : start + self.mini_batch_size])
                part = {key: take(value, rows, longest) for key, value in column.items()}
                parts.append(self.model(part)["sentence_embedding"])
            vectors.append(torch.cat(parts))
        columns = vectors[1][order.argsort()].chunk(len(features) - 1)
        return total(self.compute_loss_from_embeddings([vectors[0], *columns], labels))


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    scale = max(1.0, *(gradient.abs().max().item() for gradient in expected.values()))
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max().item() <= tolerance * scale, name


@pytest.mark.parametrize(
    ("mini_batch_size", "negatives", "more"),
    [(1, 0, {}), (3, 1, {}), (3, 2, {"matryoshka_dims": [8, 32], "passage_bits": [32, 8, 1]}), (50, 3, {})],
)
def test_cached_gradients_are_the_plain_ones(
    student: SentenceTransformer, mini_batch_size: int, negatives: int, more: dict[str, Any]
) -> None:
    student = student.double()
    settings: dict[str, Any] = {"temperature": 0.5, "student_temperature": 4.0, **more}
    of_plain, of_cached = targets(negatives), targets(negatives)
    plain = total(TightlyCoupledLoss(student, **settings)(features(student, negatives), of_plain))
    expected = gradients(student, plain)
    cached = TightlyCoupledLoss(student, mini_batch_size=mini_batch_size, **settings)
    loss = total(cached(features(student, negatives), of_cached))
    assert {k: v.item() for k, v in of_cached.report.items()} == pytest.approx(
        {k: v.item() for k, v in of_plain.report.items()}, abs=1e-9
    )
    assert plain.dtype == loss.dtype == torch.float64
    assert loss.item() == pytest.approx(plain.item(), abs=1e-9)
    close(gradients(student, loss), expected, 1e-6)


def test_a_prompt_length_in_a_tensor_is_cut_with_its_rows(student: SentenceTransformer) -> None:
    of_ints = features(student, 2)
    of_tensors = [column | {"prompt_length": torch.full((7,), column["prompt_length"])} for column in of_ints]
    loss = TightlyCoupledLoss(student, mini_batch_size=4)
    assert total(loss(of_tensors, targets(2))).item() == total(loss(of_ints, targets(2))).item()


def test_with_dropout_gradients_are_those_of_the_same_chunks(tmp_path: Path) -> None:
    dropping = str(tiny_bert(tmp_path, seed=11, dropout=0.3))
    student = build_student(dropping, encoding="tct", document_length=64).train()

    def step(kind: type[TightlyCoupledLoss], seed: int) -> tuple[float, dict[str, Tensor]]:
        torch.manual_seed(seed)
        loss = total(kind(student, temperature=1.0, mini_batch_size=2)(features(student, 2), targets(2)))
        return loss.item(), gradients(student, loss)

    expected, wanted = step(SameChunks, 0)
    found, got = step(TightlyCoupledLoss, 0)
    assert found == pytest.approx(expected, abs=1e-6)
    close(got, wanted, 1e-6)
    assert abs(step(TightlyCoupledLoss, 1)[0] - expected) > 1e-4  # dropout is on


def test_the_self_coupled_loss_equals_plain_torch(base: Path) -> None:
    student = embedding_model(base, similarity="cosine").eval()
    texts = [QUERIES[:3], passages(0)[:3], passages(1)[:3]]
    loss = TightlyCoupledLoss(student, temperature=1.0, hard_label_weight=0.4, self_coupled=[6.0, 12.0])
    lexical, mask = torch.rand(3, 6), torch.ones(3, 6, dtype=torch.bool)
    mask[0, 4] = False
    labels = TeacherTargets(scores=lexical, mask=mask, positive_index=torch.tensor([0, 1, -1]))
    parts = loss([student.preprocess(column) for column in texts], labels)

    def read(texts: list[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        out = [student[0].model(**student.tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
        pooled = torch.stack([torch.nn.functional.normalize(one.mean(0), dim=0) for one in out])
        return pooled, [torch.nn.functional.normalize(one, dim=1) for one in out]

    (queries, query_tokens), (documents, document_tokens) = read(texts[0]), read(texts[1] + texts[2])
    cosines = queries @ documents.T
    maxsim = torch.stack([torch.stack([(q @ p.T).amax(1).mean() for p in document_tokens]) for q in query_tokens])
    hidden = ~mask
    teacher = (lexical + 6 * cosines + 12 * maxsim).detach().masked_fill(hidden, float("-inf")).log_softmax(1)
    of_pooled, of_tokens = ((20 * one).masked_fill(hidden, float("-inf")).log_softmax(1) for one in (cosines, maxsim))
    divergence = torch.where(hidden, 0.0, teacher.exp() * (teacher - of_pooled)).sum(1).mean()
    torch.testing.assert_close(parts["distillation"], 0.6 * divergence, atol=1e-5, rtol=1e-4)
    for name, scores in (("hard_label", of_pooled), ("token_hard_label", of_tokens)):
        torch.testing.assert_close(parts[name], -0.4 * (scores[0, 0] + scores[1, 1]) / 2, atol=1e-5, rtol=1e-4)


def test_what_self_coupling_can_not_do_is_refused_when_the_trainer_is_built(
    student: Any, trainer_of: Any, sparse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = TightlyCoupledLoss(student, self_coupled=[6.0, 12.0])
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "num_processes", 2)  # that have met after the loss was made
        with pytest.raises(ValueError, match="train a dense student without routes, in one process"):
            trainer_of(triples(8), loss=loss)
    trainer_of(triples(8), loss=loss)
    loss.mini_batch_size = 2
    with pytest.raises(ValueError, match="leave out mini_batch_size"):
        trainer_of(triples(8), loss=loss)
    with pytest.raises(ValueError, match="train a dense student without routes, in one process"):
        TightlyCoupledLoss(sparse, self_coupled=[6.0, 12.0])
