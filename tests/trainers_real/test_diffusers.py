"""A UNet under diffusers' average and schedule, saved by accelerate with the hooks that diffusers' scripts register."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers_real.course import END, EVERY, ORIGIN, VALID, Course, assert_goes_on, predicted

diffusers = pytest.importorskip("diffusers")
training_utils = pytest.importorskip("diffusers.training_utils")
optimization = pytest.importorskip("diffusers.optimization")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own


class Run:
    """An unconditional diffusion; the batch of a step depends on the step alone."""

    def __init__(self) -> None:
        from accelerate import Accelerator

        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True)
        model = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        self.average = training_utils.EMAModel(
            model.parameters(), decay=0.99, use_ema_warmup=True, model_cls=diffusers.UNet2DModel, model_config=model.config
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
        schedule = optimization.get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=10, num_training_steps=END)
        self.accelerator.register_save_state_pre_hook(self._save)
        self.accelerator.register_load_state_pre_hook(self._load)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        self.noise = diffusers.DDPMScheduler(num_train_timesteps=100)
        self.step = 0

    def _save(self, models: list[Any], weights: list[Any], folder: str) -> None:
        self.average.save_pretrained(str(Path(folder) / "unet_ema"))
        for model in models:
            model.save_pretrained(str(Path(folder) / "unet"))
            weights.pop()

    def _load(self, models: list[Any], folder: str) -> None:
        found = training_utils.EMAModel.from_pretrained(str(Path(folder) / "unet_ema"), diffusers.UNet2DModel)
        self.average.load_state_dict(found.state_dict())
        while models:
            models.pop().load_state_dict(diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet").state_dict())

    def train(self, until: int, course: Course, folder: Path | None = None) -> None:
        while self.step < until:
            generator = torch.Generator().manual_seed(self.step)
            wave = torch.linspace(0, 6, 8)[None, None, :, None] * torch.rand(4, 1, 1, 1, generator=generator)
            noise, times = torch.randn(4, 1, 8, 8, generator=generator), torch.randint(0, 100, (4,), generator=generator)
            noisy = self.noise.add_noise(torch.sin(wave).expand(4, 1, 8, 8), noise, times)
            self.step += 1
            course.rates[self.step] = self.optimizer.param_groups[0]["lr"]
            self.accelerator.backward(torch.nn.functional.mse_loss(self.model(noisy, times).sample, noise))
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.average.step(self.model.parameters())
            if folder and self.step % EVERY == 0:
                self.accelerator.save_state(str(folder / f"checkpoint-{self.step}"))


def test_diffusers_goes_on_from_a_forecast_and_its_average_has_moved(tmp_path: Path) -> None:
    run, whole = Run(), Course()
    run.train(ORIGIN, whole, tmp_path / "run")
    before = [value.clone() for value in run.average.shadow_params]
    run.train(END, whole)
    forecast = predicted(tmp_path / "run", tmp_path / f"checkpoint-{VALID}")
    resumed, course = Run(), Course()
    resumed.accelerator.load_state(str(forecast))
    resumed.step = VALID
    assert resumed.average.optimization_step == VALID
    assert {float(state["step"]) for state in resumed.optimizer.state.values()} == {float(VALID)}
    assert all(not torch.equal(one, other) for one, other in zip(before, resumed.average.shadow_params, strict=True))
    resumed.train(END, course)
    assert_goes_on(course, whole)
