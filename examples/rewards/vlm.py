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
to 5 scores 0, as FlowGRPO has it, and is warned of.
SPDX-License-Identifier: MIT
"""

import os
import re
import warnings

import torch

import nft

MODEL = "CodeGoat24/UnifiedReward-qwen-3b"
TEMPLATE = """\
This image was generated from a text caption. Judge it by two things: does it show what the \
caption says, every object with its attributes, number and place; and is it a good picture, clear, \
undistorted and pleasant to look at? Then give one score from 1 (bad) to 5 (excellent), decimals \
allowed. End with the line "Final Score: " and the number.
Text Caption: [{prompt}]"""
# The score that becomes 1.
HIGHEST = 5
# "4.5", and the 4 of "4/5" and "4 out of 5".
NUMBER = r"(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*\d+)?"
# The longest answer; one that is cut off there is read as it stands.
TOKENS = 512


def read(answer):
    """An answer's last number over 5, in [0, 1]; 0 where there is no such number."""
    numbers = re.findall(NUMBER, answer)
    if not numbers or float(numbers[-1]) > HIGHEST:
        warnings.warn(f"vlm: {answer!r:.100} has no number up to 5 and scores 0", stacklevel=2)
        return 0.0
    return float(numbers[-1]) / HIGHEST


def load_processor(repository):
    """The processor of a model, for batches of questions."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(repository)
    tokenizer = processor.tokenizer
    # Answers go on from the last token of a question.
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def load_model(repository):
    """The model in fp32, which decodes greedily."""
    from transformers import AutoModelForImageTextToText, GenerationConfig

    model = AutoModelForImageTextToText.from_pretrained(repository, dtype=torch.float32)
    # The repository's own settings go: they may sample, and a repetition penalty would see the
    # batch's padding.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=TOKENS,
        eos_token_id=model.generation_config.eos_token_id,
    )
    return model


def reward():
    """Make the judge of NFT_VLM: scores in [0, 1]."""
    repository = os.environ.get("NFT_VLM", MODEL)
    template = os.environ.get("NFT_VLM_TEMPLATE", TEMPLATE)
    processor = load_processor(repository)
    model = load_model(repository)

    def ask(images, prompts):
        """(B, 3, H, W) in [0, 1] and B strings -> B answers."""
        chats = []
        for image, prompt in zip(images, prompts, strict=True):
            picture = {"type": "image", "image": nft.to_pil(image)}
            question = {"type": "text", "text": template.replace("{prompt}", prompt)}
            chats.append([{"role": "user", "content": [picture, question]}])
        inputs = processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(images.device)
        model.to(images.device)
        tokens = model.generate(**inputs, pad_token_id=processor.tokenizer.pad_token_id)
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(answers, skip_special_tokens=True)

    def judge(images, prompts, metadata):
        """The score of each image for its prompt: B floats, and the answers they stand in."""
        answers = ask(images, prompts)
        return [read(answer) for answer in answers], answers

    return judge
