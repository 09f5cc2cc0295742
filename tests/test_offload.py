"""Models that accelerate spreads over devices, memory and disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

import cllava_fast as cf
from tests.helpers import learn
from tests.test_bases import ASKED, _model, batch_of, logits, model_of, patched, pictures, processor_of


class TestOffload:
    """A model that accelerate spreads: increments are where each layer computes, and nothing of it is moved."""

    NAME = "LlavaForConditionalGeneration"
    ON_DISK = ("model.language_model.embed_tokens", "model.language_model.layers.1")

    def spread(self, how: str, folder: Path) -> Any:
        if how == "cpu_offload":
            return accelerate.cpu_offload(model_of(self.NAME), execution_device=torch.device("cpu"))
        if how == "disk_offload":
            return accelerate.disk_offload(model_of(self.NAME), folder, execution_device=torch.device("cpu"))
        parts = [f"model.language_model.{part}" for part in ("layers.0", "norm", "rotary_emb")]
        parts += ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        _model(self.NAME).save_pretrained(folder / "base")
        model = transformers.LlavaForConditionalGeneration.from_pretrained(
            folder / "base", device_map=dict.fromkeys(parts, "cpu") | dict.fromkeys(self.ON_DISK, "disk"),
            offload_folder=folder / "offload", dtype=torch.float32,
        )  # fmt: skip
        return model.eval()

    @pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
    def test_as_if_it_were_in_one_place(self, how: str, generator: torch.Generator, tmp_path: Path) -> None:
        here, batch = patched(self.NAME, generator), batch_of(self.NAME, generator)
        cf.save_pretrained(here, tmp_path / "out")
        model = self.spread(how, tmp_path)
        bare = logits(model, batch)
        devices = {name: parameter.device for name, parameter in model.named_parameters()}
        assert {device.type for device in devices.values()} >= {"meta"}
        cf.load_pretrained(model, tmp_path / "out", processor=processor_of(self.NAME))
        assert {tensor.device.type for tensor in model.increments.state_dict().values()} == {"cpu"}
        assert torch.equal(logits(model, batch), logits(here, batch))
        assert torch.equal(model.generate(**batch, max_new_tokens=3), here.generate(**batch, max_new_tokens=3))
        assert {name: model.get_parameter(name).device for name in devices} == devices
        with pytest.raises(ValueError, match=r"layers\.[01]\.self_attn\.q_proj is offloaded"):
            cf.merge(model, instruction=ASKED[0])
        increments = learn(model, 1, generator, commit_last=False)
        increments.pool.train_keys(False)
        asked, batch = batch, batch_of(self.NAME, generator, side="right")
        model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in increments.pool.parameters() if p is not increments.pool.block_keys)
        cf.unpatch(model).eval()
        assert torch.equal(logits(model, asked), bare)
        assert {name: parameter.device for name, parameter in model.named_parameters()} == devices

    @pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
    def test_a_stream_is_learned(self, how: str, generator: torch.Generator, tmp_path: Path) -> None:
        found, processor = [], processor_of(self.NAME)
        samples = [cf.Sample(ASKED[0], "red", picture) for picture in pictures(generator)]
        for name, model in (("here", model_of(self.NAME)), (how, self.spread(how, tmp_path))):
            cf.patch(model, cf.IncrementConfig(rows_per_task=2, top_m=1, surrogate="backbone"), processor=processor)
            arguments = cf.ContinualArguments(
                output_dir=str(tmp_path / name), max_steps=2, align_steps=1, warmup_steps=0, max_new_tokens=1,
                per_device_train_batch_size=2, progress=False, logging_steps=1,
            )  # fmt: skip
            stream = cf.Stream([cf.Task("a", train=samples, test=samples)])
            found.append(cf.ContinualTrainer(model, processor, stream, arguments).train())
        assert any(parameter.is_meta for parameter in model.parameters())
        assert found[1].losses == found[0].losses and found[1].accuracy_matrix == found[0].accuracy_matrix

    def test_hooks_that_came_after_the_patch_go_first(self, generator: torch.Generator) -> None:
        model = patched(self.NAME, generator)
        linear = model.model.language_model.layers[0].self_attn.o_proj
        accelerate.hooks.add_hook_to_module(linear, accelerate.hooks.ModelHook())
        with pytest.raises(ValueError, match="forward of Linear was replaced after patch"):
            cf.unpatch(model)
        accelerate.hooks.remove_hook_from_module(linear)
        cf.unpatch(model)
