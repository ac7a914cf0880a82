"""The training data of the tiny cohort."""

import pytest
import torch

from pipeline.gem.training.dataset import TrainingData


@pytest.fixture(scope="session")
def data(cohort) -> TrainingData:
    return TrainingData.load(cohort, torch.device("cpu"))
