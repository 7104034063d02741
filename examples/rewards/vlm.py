"""A vision-language model as the judge: it is shown image and prompt, and answers with a score.

    python nft.py --model sd3 --reward vlm
    NFT_VLM=llava-hf/llava-1.5-7b-hf python nft.py --model sd3 --reward vlm

NFT_VLM is an image-text-to-text model of transformers with a chat template: a hub id or a
directory. The default was tuned to judge: UnifiedReward (arXiv 2503.05236) on Qwen2.5-VL, 15 GB in
fp32; CodeGoat24/UnifiedReward-qwen-7b takes 33 GB. (FlowGRPO's code asks UnifiedReward-7b-v1.5 on a
server, which is in the format of LLaVA-NeXT's own code.) Qwen's processors need torchvision.

NFT_VLM_TEMPLATE replaces the question, with {prompt} in it. The one here is ours; the one that
UnifiedReward was trained on is in its repository under inference_qwen/image_generation/. Answers
are decoded greedily. A score is the last number of an answer over 5. An answer without a number up
to 5 scores 0, as FlowGRPO has it, but the run stops where no answer has had one yet.
SPDX-License-Identifier: MIT
"""

import os
import re
import sys
from pathlib import Path

import torch
from clip import load

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nft

MODEL = os.environ.get("NFT_VLM", "CodeGoat24/UnifiedReward-qwen-3b")
QUESTION = """\
This image was generated from a text caption. Judge it by two things: does it show what the \
caption says, every object with its attributes, number and place; and is it a good picture, clear, \
undistorted and pleasant to look at? Then give one score from 1 (bad) to 5 (excellent), decimals \
allowed. End with the line "Final Score: " and the number.
Text Caption: [{prompt}]"""
TEMPLATE = os.environ.get("NFT_VLM_TEMPLATE", QUESTION)
# The score that becomes 1.
HIGHEST = 5
# "4.5", and the 4 of "4/5" and "4 out of 5".
NUMBER = r"(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*\d+)?"
# The longest answer; one that is cut off there is read as it stands.
TOKENS = 512
# Models that have given a number.
READABLE = set()


def read(answer):
    """An answer's last number over 5, in [0, 1]; None where there is no such number."""
    numbers = re.findall(NUMBER, answer)
    if not numbers:
        return None
    score = float(numbers[-1]) / HIGHEST
    return score if score <= 1 else None


def make_processor(repository):
    """The processor of a model, for batches of questions."""
    from transformers import AutoProcessor

    # False also keeps transformers from asking on the terminal.
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=False)
    tokenizer = processor.tokenizer
    # Answers go on from the last token of a question.
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def make_judge(repository):
    """The model in fp32, which decodes greedily."""
    from transformers import AutoModelForImageTextToText, GenerationConfig

    model = AutoModelForImageTextToText.from_pretrained(
        repository, dtype=torch.float32, trust_remote_code=False
    )
    # The repository's own settings go: they may sample, and a repetition penalty would see the
    # batch's padding.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=TOKENS,
        eos_token_id=model.generation_config.eos_token_id,
    )
    return model


def ask(images, prompts):
    """(B, 3, H, W) in [0, 1] and B strings -> B answers."""
    processor = load(make_processor, MODEL)
    judge = load(make_judge, MODEL, images.device)
    chats = []
    for image, prompt in zip(images, prompts, strict=True):
        picture = {"type": "image", "image": nft.to_pil(image)}
        question = {"type": "text", "text": TEMPLATE.replace("{prompt}", prompt)}
        chats.append([{"role": "user", "content": [picture, question]}])
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(images.device)
    tokens = judge.generate(**inputs, pad_token_id=processor.tokenizer.pad_token_id)
    answers = tokens[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(answers, skip_special_tokens=True)


@torch.no_grad()
def reward(images, prompts, metadata):
    """B scores in [0, 1], and {"answers": the B answers that they were read from}.

    images: (B, 3, H, W) in [0, 1]. prompts: B strings. Raises ValueError while the model has given
    no number, RuntimeError where it does not load.
    """
    answers = ask(images, prompts)
    scores = [read(answer) for answer in answers]
    if any(score is not None for score in scores):
        READABLE.add(MODEL)
    if MODEL not in READABLE:
        raise ValueError(
            f"NFT_VLM={MODEL} answered {answers[0]!r:.100}: must give a number up to {HIGHEST}; "
            "change NFT_VLM_TEMPLATE, or take another model"
        )
    return [score or 0.0 for score in scores], {"answers": answers}
