"""The preflight refuses what cannot be trained whole, and the collator splits rows where generation begins."""

from __future__ import annotations

import copy
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vcot.pipeline.errors import DataError
from vcot.training.dpo.rows import PairCollator, check_pairs, load_pairs, render_pair, scale_images
from vcot.training.model.loading import completion_logprobs, load_model
from vcot.training.nano.architecture import NUM_IMAGE_TOKENS

LIMITS = {"max_length": 512, "max_image_side": 336}


def text(content):
    return [{"type": "text", "text": content}]


def make_row(**changes):
    row = {
        "task": "t/1",
        "images": [Image.new("RGB", (56, 56), "red")],
        "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, *text("What is it?")]}],
        "chosen": [{"role": "assistant", "content": text("The circle is red.")}],
        "rejected": [{"role": "assistant", "content": text("The square is blue. No.")}],
    }
    return {**row, **changes}


class Rows(list):
    """As much of a Dataset as the preflight uses, without Arrow between."""

    def select(self, indices):
        return Rows(self[i] for i in indices)

    def select_columns(self, columns):
        return Rows({name: row[name] for name in columns} for row in self)


def refusal(processor, row, **limits):
    kept, summary = check_pairs(Rows([row]), processor, **{**LIMITS, **limits})
    assert (len(kept), summary.num_kept, summary.num_rows) == (0, 0, 1)
    ((task, reason),) = summary.refused
    assert task == "t/1"
    return reason


def test_published_pairs_pass_whole(processor, make_job):
    from vcot.training.protocol.job import JOB, TrainJob, read_record

    job = read_record(make_job() / JOB, TrainJob)
    rows = load_pairs(f"{job.pairs_path}/train.parquet")
    kept, summary = check_pairs(rows, processor, **LIMITS)
    assert isinstance(kept, Dataset)
    assert kept.column_names == ["images", "prompt", "chosen", "rejected"]
    assert isinstance(kept[0]["images"][0], Image.Image)
    assert (summary.num_rows, summary.num_kept, summary.refused) == (10, 10, ())
    assert 0 < summary.max_length <= LIMITS["max_length"]
    assert summary.example.startswith("<s>USER: <image>\n")
    assert summary.example.endswith("</s>")


def test_responses_that_only_the_template_makes_alike_are_refused(processor):
    """Nothing can be learned of them, and each would count as a pair whose chosen response is not preferred."""
    row = make_row(rejected=[{"role": "assistant", "content": text("The circle is red.\n")}])
    assert refusal(processor, row) == "chosen and rejected are the same tokens"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": []}, r"0 image\(s\), but 1 image part"),
        ({"images": None}, r"0 image\(s\), but 1 image part"),
        ({"rejected": make_row()["chosen"]}, "chosen and rejected are the same"),
        ({"images": [Image.new("RGB", (56, 56))] * 2}, r"2 image\(s\), but 1 image part"),
        ({"chosen": [{"role": "assistant", "content": text("An <image> here.")}]}, "special token <image>"),
        ({"chosen": [{"role": "assistant", "content": text("<s>The red.")}]}, "special token <s>"),
        ({"chosen": [{"role": "assistant", "content": text("Red.</s> Blue.")}]}, "special token </s>"),
    ],
)
def test_refused_with_its_reason(processor, changes, reason):
    assert pytest.importorskip("re").search(reason, refusal(processor, make_row(**changes)))


WORDS = {"images": [], "prompt": [{"role": "user", "content": text("What is red?")}]}
TWO = {
    "images": [Image.new("RGB", (56, 56), "red"), Image.new("RGB", (84, 56), "blue")],
    "prompt": [{"role": "user", "content": [{"type": "image", "text": None}] * 2 + text("Which is red?")}],
}


@pytest.mark.parametrize(("changes", "num_images"), [(WORDS, 0), (TWO, 2), ({**WORDS, "images": None}, 0)])
def test_a_row_may_have_no_image_or_several(processor, changes, num_images):
    row = make_row(**changes)
    kept, summary = check_pairs(Rows([row]), processor, **LIMITS)
    assert (len(kept), summary.refused) == (1, ())
    batch = PairCollator(processor, 336)([row])
    assert summary.max_length == int(batch["attention_mask"].sum(dim=1).max())
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [num_images * NUM_IMAGE_TOKENS] * 2


def test_rows_with_and_without_images_make_one_batch(processor, checkpoint):
    rows = [make_row(), make_row(**WORDS), make_row(**TWO)]
    model = load_model(checkpoint, torch.float32)
    together = completion_logprobs(model, PairCollator(processor, 336)(rows))
    alone = [completion_logprobs(model, PairCollator(processor, 336)([row])) for row in rows]
    for place, expected in enumerate(alone):
        for side in (0, 1):
            found = together[place + 3 * side]
            assert found[found != 0].tolist() == pytest.approx(expected[side][expected[side] != 0].tolist(), abs=1e-4)


def test_mdpo_trains_on_images_only(processor):
    assert "no image, and train.method = mdpo" in refusal(processor, make_row(**WORDS), needs_image=True)
    assert len(check_pairs(Rows([make_row()]), processor, needs_image=True, **LIMITS)[0]) == 1


def test_long_row_is_refused_and_never_cut(processor):
    row = make_row()
    _, summary = check_pairs(Rows([row]), processor, **LIMITS)
    length = summary.max_length
    kept, _ = check_pairs(Rows([row]), processor, max_length=length, max_image_side=336)
    assert len(kept) == 1
    assert f"{length} tokens are more than" in refusal(processor, row, max_length=length - 1)


def test_wrong_image_token_count_is_refused(processor, monkeypatch):
    monkeypatch.setattr(
        type(processor),
        "_get_num_multimodal_tokens",
        lambda self, image_sizes: {"num_image_tokens": [17] * len(image_sizes)},
    )
    assert refusal(processor, make_row()) == f"{NUM_IMAGE_TOKENS} image tokens, but the processor announces 17"


def test_only_one_row_of_each_image_size_goes_through_the_processor(processor, monkeypatch):
    sizes, real = [], type(processor).__call__

    def remember(self, images=None, **options):
        sizes.extend(image.size for group in images for image in group)
        return real(self, images=images, **options)

    monkeypatch.setattr(type(processor), "__call__", remember)
    rows = Rows(make_row(task=str(n), images=[Image.new("RGB", (56 + 28 * (n % 2), 56))]) for n in range(6))
    kept, summary = check_pairs(rows, processor, **LIMITS)
    assert (len(kept), sizes) == (6, [(56, 56), (84, 56)])
    batch = PairCollator(processor, 336)([rows[3]])
    assert summary.max_length == int(batch["attention_mask"].sum(dim=1).max())


def test_an_image_that_cannot_be_read_is_refused(processor):
    class Torn(Rows):
        def __getitem__(self, index):
            if index == 1:
                raise OSError("image file is truncated")
            return super().__getitem__(index)

    _, summary = check_pairs(Torn([make_row(), make_row()]), processor, **LIMITS)
    assert summary.refused == (("row 1", "an image cannot be read (image file is truncated)"),)
    assert summary.refused_rows == (1,)


def test_summary_keeps_the_good_rows(processor):
    rows = Rows([make_row(task="a"), make_row(task="b", images=[]), make_row(task="c")])
    kept, summary = check_pairs(rows, processor, **LIMITS)
    assert len(kept) == 2
    assert (summary.num_rows, summary.num_kept, [task for task, _ in summary.refused]) == (3, 2, ["b"])


def test_collator_equals_trls_where_tokens_do_not_merge(processor):
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    rows = [make_row(), make_row(chosen=[{"role": "assistant", "content": text("The red. The blue. The red.")}])]
    ours = PairCollator(processor, 336)(rows)
    stripped = []
    for row in rows:
        row = {key: copy.deepcopy(row[key]) for key in ("images", "prompt", "chosen", "rejected")}
        row["prompt"][0]["content"][0].pop("text")
        stripped.append(row)
    trl = DataCollatorForVisionPreference(processor)(stripped)
    assert set(ours) == set(trl)
    for key, tensor in trl.items():
        assert torch.equal(ours[key], tensor), key


def test_batch_holds_whole_rows(processor):
    row = make_row()
    batch = PairCollator(processor, 336)([row])
    tokenizer = processor.tokenizer
    assert batch["input_ids"].shape[0] == 2
    for ids, mask, completion, answer in zip(
        batch["input_ids"],
        batch["attention_mask"],
        batch["completion_mask"],
        ("The circle is red.", "The square is blue. No."),
        strict=True,
    ):
        assert (ids == processor.image_token_id).sum() == NUM_IMAGE_TOKENS
        assert tokenizer.decode(ids[completion == 1]) == f" {answer}</s>"
        assert not (completion & ~mask).any()
        assert ids[0] == tokenizer.bos_token_id


def test_a_row_that_begins_twice_is_refused(processor):
    """A policy that is trained so meets another prompt when it is served."""
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    assert refusal(processor, make_row()) == "<s> occurs 2 times"


def test_a_tokenizer_that_adds_bos_by_itself_doubles_none(processor):
    """As LLaVA's does: the template has written it already."""
    tokenizer = processor.tokenizer
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    assert tokenizer("red")["input_ids"][0] == tokenizer.bos_token_id
    row = make_row()
    _, summary = check_pairs(Rows([row]), processor, **LIMITS)
    assert summary.refused == ()
    ids = PairCollator(processor, 336)([row])["input_ids"]
    assert (ids == tokenizer.bos_token_id).sum(dim=1).tolist() == [1, 1]


def metaspace_tokenizer():
    """Puts a space marker before every text, as Llama's does: tokenized apart, a completion begins with two."""
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "▁", "▁USER:", "▁A", "▁ASSISTANT:", "▁red", "▁blue", "▁\n"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def test_completion_is_tokenized_as_generation_produces_it(processor):
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    tokenizer = metaspace_tokenizer()
    llama = type(processor)(
        image_processor=processor.image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=processor.chat_template,
    )
    row = make_row(
        prompt=[{"role": "user", "content": [{"type": "image"}, *text("A")]}],
        chosen=[{"role": "assistant", "content": text("red")}],
        rejected=[{"role": "assistant", "content": text("blue")}],
    )

    def chosen_pieces(batch):
        return tokenizer.convert_ids_to_tokens(batch["input_ids"][0][batch["completion_mask"][0] == 1])

    assert chosen_pieces(PairCollator(llama, 336)([row])) == ["▁red", "</s>"]
    trl = DataCollatorForVisionPreference(llama)([copy.deepcopy(row)])
    assert chosen_pieces(trl) != ["▁red", "</s>"], "TRL mended this: its own collator would do"


def test_merging_prompt_and_response_is_refused(processor, monkeypatch):
    processor.chat_template = processor.chat_template.replace("' ' + part['text'] | trim", "part['text'] | trim")
    row = make_row(
        chosen=[{"role": "assistant", "content": text(":) red")}],
        rejected=[{"role": "assistant", "content": text("x")}],
    )
    pair = render_pair(row, processor)
    assert pair.chosen.startswith(pair.prompt)
    real = processor.tokenizer.__class__.__call__

    def merging(self, texts, **options):
        """A tokenizer that reads `::` as another piece."""
        if isinstance(texts, str):
            texts = texts.replace("ASSISTANT::", "ASSISTANT")
        return real(self, texts, **options)

    monkeypatch.setattr(processor.tokenizer.__class__, "__call__", merging)
    assert refusal(processor, row) == "prompt and response merge into other tokens than generation sees"


def test_images_are_scaled_down_and_never_up():
    big, small = Image.new("RGB", (400, 200)), Image.new("RGBA", (50, 30))
    scaled = scale_images({"images": [big, small]}, 336)
    assert [image.size for image in scaled] == [(336, 168), (50, 30)]
    assert {image.mode for image in scaled} == {"RGB"}
    assert big.size == (400, 200)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"missing.parquet cannot be read"):
        load_pairs(tmp_path / "missing.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"junk.parquet cannot be read"):
        load_pairs(tmp_path / "junk.parquet")
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "columns.parquet")
    with pytest.raises(DataError, match="no column 'images'"):
        load_pairs(tmp_path / "columns.parquet")
    columns = {"images": [[1]], "prompt": ["x"], "chosen": ["y"], "rejected": ["z"]}
    pq.write_table(pa.table(columns), tmp_path / "images.parquet")
    with pytest.raises(DataError, match="no list of encoded images"):
        load_pairs(tmp_path / "images.parquet")


def test_parquet_without_datasets_metadata_is_read(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), "blue").save(buffer, "PNG")
    columns = {
        "images": [[{"bytes": buffer.getvalue(), "path": "x.png"}]],
        "prompt": ["x"],
        "chosen": ["y"],
        "rejected": ["z"],
    }
    pq.write_table(pa.table(columns), tmp_path / "plain.parquet")
    assert load_pairs(tmp_path / "plain.parquet")[0]["images"][0].size == (20, 10)
