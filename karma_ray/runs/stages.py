"""The stages of a run as picklable recipes: what a worker needs to build its model and batches.

    language model  ->  warm-up (stage 1)  ->  joint training (stage 2)

A `Stage` is sent to the workers as a few strings and a configuration; they open the model,
catalogue and tokens themselves. Pretraining and warm-up do not depend on the objective, so
compared recipes start from the same weights. Both are cached under what they depend on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pyarrow as pa
import torch

from karma_ray.artifacts import RunFolder, join, read_json, read_table
from karma_ray.baselines.sequential import IdModel, IdRecommender, IdSizes
from karma_ray.config import Config, from_dict
from karma_ray.data.batch import Batch
from karma_ray.data.catalog import Catalog
from karma_ray.data.collate import Collator
from karma_ray.data.prompts import Tokenizer
from karma_ray.data.tokens import TextLengths, catalog_tokens
from karma_ray.data.visual import VisualFeatures
from karma_ray.errors import InputError
from karma_ray.model.backbone import hidden_size, num_layers
from karma_ray.model.backbones.checkpoints import load_lm_head, num_tokens
from karma_ray.model.backbones.registry import checkpoint_family
from karma_ray.model.backbones.sentence_folder import refuse_hub_name, sentence_folder
from karma_ray.model.backbones.tokenizer import check_tokens_shared, load_tokenizer
from karma_ray.model.config import GeneratorConfig
from karma_ray.model.device import this_device
from karma_ray.model.interest import InterestModel
from karma_ray.model.item_encoder import ItemEncoder, start_from
from karma_ray.model.karma import KarmaModel
from karma_ray.model.lora import set_encoder_trained
from karma_ray.runs.frozen_outputs import EncodeRemotely, FrozenOutputs
from karma_ray.runs.stage_images import build_imagery, load_visual
from karma_ray.training.checkpoints.checkpoint import load_weights

STAGE_VERSION = 3
"""Raised when the code changes the content of a cached stage, so that old caches are ignored."""

NUM_WHITENED, WHITENED_PER_DIMENSION = 2048, 8
"""Items that the initial whitening of the item embeddings is fitted on: as many, or as many for
every dimension of a wide body, whose covariance a smaller sample would not determine."""
NUM_COUNTED = 200_000
"""Items whose words are counted for the lexical block of the item embeddings."""


def is_tiny(config: Config) -> bool:
    """Whether the backbones are built here instead of loaded.

    Item encoder and user decoder share one tokenizer, so either both are `tiny` or neither is.
    Raises InputError on a mixture, on checkpoints that do not share a vocabulary, and on models
    that cannot be computed exactly.
    """
    item, user = config.model.item_encoder.checkpoint, config.model.user_decoder.checkpoint
    if (item == "tiny") != (user == "tiny"):
        raise InputError(
            "model.item_encoder.checkpoint", item,
            f"does not go with model.user_decoder.checkpoint {user!r}: they share a tokenizer",
        )  # fmt: skip
    if item == "tiny":
        return True
    refuse_hub_name(item)
    multimodal = config.model.item_encoder.modality == "multimodal"
    checkpoint_family(item, "model.item_encoder.checkpoint", with_vision=multimodal)
    checkpoint_family(user, "model.user_decoder.checkpoint")
    check_tokens_shared(item, user, num_tokens(item), num_tokens(user))
    return False


def over_ids(config: Config) -> bool:
    """Whether the model is a baseline over item ids; raises InputError on terms that need text."""
    if config.model.kind == "karma":
        return False
    objective, built = config.objective, config.objective.built
    for is_built, name in (
        (built.generation, "generation"), (built.reconstruction, "reconstruction"),
        (built.image, "lambda_img"),
    ):  # fmt: skip
        if is_built:
            message = f"needs a model that reads text, not {config.model.kind}: set it to 0"
            raise InputError(f"objective.{name}", getattr(objective, name), message)
    return True


def with_checkpoints(config: Config, item: str, user: str) -> Config:
    """Return the configuration with other checkpoints (`tiny` becomes its pretrained folder)."""
    model = config.model
    return replace(
        config,
        model=replace(
            model,
            item_encoder=replace(model.item_encoder, checkpoint=item),
            user_decoder=replace(model.user_decoder, checkpoint=user),
        ),
    )


def model_size(model: KarmaModel | IdModel) -> dict[str, int]:
    """Return how many weights a run's model has, how many of them learn, and its layers."""
    weights = list(model.parameters())
    size = {
        "num_parameters": sum(value.numel() for value in weights),
        "num_trained": sum(value.numel() for value in weights if value.requires_grad),
    }
    if isinstance(model, KarmaModel):
        interest, encoder = model.interest, model.interest.item_encoder
        size["item_layers"] = num_layers(encoder.body)
        size["item_layers_frozen"] = encoder.num_frozen
        size["user_layers"] = num_layers(interest.user_decoder.body)
    return size


def finished_stage(run: str, items_uri: str) -> Stage:
    """Return the stage with the trained model of a run, from the run folder alone."""
    folder = RunFolder(run)
    config = from_dict(read_json(folder.config))
    item, user = join(folder.bundle, "item_encoder"), join(folder.bundle, "user_decoder")
    return Stage(
        with_checkpoints(config, item, user),
        items_uri,
        trained=join(folder.checkpoints, "joint", "final"),
        tokenizer_folder=join(folder.bundle, "tokenizer"),
    )


@dataclass(frozen=True)
class Stage:
    """What every worker of a stage opens: a resolved configuration and the paths of its inputs."""

    config: Config
    items_uri: str
    warm: str | None = None  # weights that stage 2 starts from
    trained: str | None = None  # weights that stage 2 ended with
    tokenizer_folder: str | None = None  # default: the user decoder's checkpoint
    frozen: FrozenOutputs | None = None  # of the item encoder's frozen layers; None: run them
    contents: str | None = None  # table of near-duplicates; None: those of equal text

    def catalog(self) -> Catalog:
        """Open the memory-mapped catalogue."""
        catalog = Catalog.load(self.items_uri)
        if self.contents is None:
            return catalog
        return catalog.with_contents(read_table(self.contents).column("content").to_numpy())

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that both LLMs share."""
        return cast(Tokenizer, load_tokenizer(self._tokenizer_folder))

    @property
    def _tokenizer_folder(self) -> str:
        return self.tokenizer_folder or self.config.model.user_decoder.checkpoint

    def with_frozen(self, cache: str, encode: EncodeRemotely | None = None) -> Stage:
        """Return the stage with the outputs of the frozen layers, if it has any.

        They are computed now unless `cache` has them; `encode` does so in other processes.
        """
        frozen = FrozenOutputs.of(self.config, self.items_uri, self._tokenizer_folder, cache)
        if frozen is not None:
            frozen.make(encode if self.config.training.num_workers else None)
        return replace(self, frozen=frozen)

    def text_lengths(self) -> TextLengths:
        """Measure how much of the catalogue's texts is read."""
        limit = self.config.collate.max_item_tokens
        return TextLengths.of(self.catalog(), self.tokenizer(), limit)

    def collator(self, visual: VisualFeatures | None = None) -> Collator:
        """Return a collator with item tokens, which the workers of a node share."""
        tokenizer = self.tokenizer()
        catalog, config = self.catalog(), self.config.collate
        tokens, lengths = catalog_tokens(catalog, tokenizer, config.max_item_tokens)
        return Collator(catalog, tokenizer, config, tokens, lengths, visual)

    def make_training_collate(self) -> TrainingCollate:
        """Return the collate function of stage 2; called on the worker."""
        visual = load_visual(self.config, self.items_uri, self.catalog())
        return TrainingCollate(self.collator(visual))

    def build_joint(self) -> KarmaModel:
        """Build the model of stage 2; Task 2's private decoders copy the warmed-up decoder."""
        model = self.whole()
        if self.warm is not None:
            load_weights(self.warm, model)
        elif self.trained is None:
            self.fit_to_items(model.interest)
        images = model.imagery
        if self.config.objective.built.reconstruction or (images is not None and images.in_task2):
            head = model.lm_head if hasattr(model, "lm_head") else None
            model = KarmaModel(model.interest, model.tokenizer, lm_head=head, imagery=images)
        model.interest.generate_with(self.config.model.generator, self.config.seed)
        if (learning := self.config.training.encoder_grad) in ("frozen", "head"):
            is_head = learning == "head"
            set_encoder_trained(model.interest.item_encoder, is_head, head_only=is_head)
        return model

    def build_trained(self) -> KarmaModel:
        """Build the model of stage 2 with its final weights, in evaluation mode."""
        assert self.trained is not None
        model = self.build_joint()
        load_weights(self.trained, model)
        return model.eval()

    def build_ids(self) -> IdModel:
        """Build a baseline over item ids with initial weights; it has no earlier stages."""
        catalog, tokenizer, config = self.catalog(), self.tokenizer(), self.config
        words = tokenizer.backend_tokenizer.get_vocab_size()
        sizes = IdSizes(catalog.num_items, words, config.collate.max_history + 1)
        recommender = IdRecommender(config.model, sizes, config.seed)
        recommender.know(catalog.item_ids)
        return IdModel(recommender, tokenizer)

    def build_finished(self) -> KarmaModel | IdModel:
        """Build the trained model, of texts or of ids, in evaluation mode."""
        if not over_ids(self.config):
            return self.build_trained()
        assert self.trained is not None
        model = self.build_ids()
        load_weights(self.trained, model)
        model.interest.attach_catalog(self.catalog(), self.items_uri)
        return model.eval()

    def fit_to_items(self, interest: InterestModel) -> None:
        """Fit the whitening and the lexical block to the catalogue, before any training.

        A folder of sentence-transformers may give its own mean and W_e in place of a whitening.
        """
        collator = self.collator()
        tokens, lengths = collator.catalog_tokens()
        drawn = np.random.default_rng(self.config.seed).permutation(len(tokens))
        encoder = interest.item_encoder
        folder = sentence_folder(self.config.model.item_encoder.checkpoint)
        started = folder is not None and start_from(encoder, folder)
        if encoder.config.whiten and not started:
            self._whiten(encoder, drawn, tokens, lengths)
        if encoder.config.lexical and encoder.config.block != "states":
            rows = np.sort(drawn[:NUM_COUNTED])
            encoder.words.fit(tokens[rows], lengths[rows])
        if encoder.config.block != "words":
            encoder.fit_known(*_sampled(encoder, drawn, tokens, lengths))

    @staticmethod
    def _whiten(
        encoder: ItemEncoder, drawn: np.ndarray, tokens: np.ndarray, lengths: np.ndarray
    ) -> None:
        """Fit the whitening to the first of the drawn rows [I]."""
        device = this_device()  # thousands of texts are too much for a CPU beside a GPU
        sample, sizes, rows = _sampled(encoder, drawn, tokens, lengths)
        encoder.to(device).whiten(sample.to(device), sizes.to(device), rows)
        encoder.cpu()

    def whole(self) -> KarmaModel:
        """Build the model from the checkpoints, without private decoders."""
        config = self.config.model
        if config.kind != "karma":
            message = "has no language models: it is a baseline over item ids"
            raise InputError("model.kind", config.kind, message)
        tokenizer = self.tokenizer()
        bare = replace(config, generator=GeneratorConfig())  # the warm-up has no generator
        interest = InterestModel.build(bare, tokenizer, self.config.seed)
        interest.item_encoder.attach_catalog(self.catalog(), self.items_uri)
        if self.frozen is not None:
            self.frozen.attach(interest.item_encoder)
        bundled = self.tokenizer_folder is not None
        head = load_lm_head(config.user_decoder.checkpoint, empty=bundled)
        imagery = build_imagery(self.config, self.items_uri, interest, self.trained)
        return KarmaModel(interest, tokenizer, lm_head=head, decodes=False, imagery=imagery)


def _sampled(
    encoder: ItemEncoder, drawn: np.ndarray, tokens: np.ndarray, lengths: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens [n, L], lengths [n] and rows [n] of the first of the drawn rows [I]."""
    rows = drawn[: max(NUM_WHITENED, WHITENED_PER_DIMENSION * hidden_size(encoder.body))]
    sample = torch.from_numpy(tokens[rows].astype(np.int64))
    return sample, torch.from_numpy(lengths[rows]), torch.from_numpy(rows)


@dataclass(frozen=True)
class TrainingCollate:
    """(rows, keys) -> Batch; evaluation uses its `collator` too."""

    collator: Collator

    def __call__(self, rows: pa.Table, keys: np.ndarray) -> Batch:
        """Collate `sequences` rows."""
        return self.collator.training(rows, keys)
