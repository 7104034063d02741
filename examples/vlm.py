"""A vision-language model as the judge: it is shown the image and the prompt, and answers with a score.

    python nft.py --model sd3 --reward examples/vlm.py:reward
    NFT_VLM=llava-hf/llava-1.5-7b-hf python nft.py --model sd3 --reward examples/vlm.py:reward

NFT_VLM is an image-text-to-text model of transformers with a chat template: a hub id or a directory. The default
was tuned to judge: UnifiedReward (arXiv 2503.05236) on Qwen2.5-VL, 15 GB in fp32; CodeGoat24/UnifiedReward-qwen-7b
takes 33 GB. (FlowGRPO's code asks UnifiedReward-7b-v1.5 on a server, which is in the format of LLaVA-NeXT's own
code.) Qwen's processors need torchvision. NFT_VLM_TEMPLATE replaces the question, with {prompt} in it; the one here
is ours, the one that UnifiedReward was trained on is in its repository under inference_qwen/image_generation/.
Answers are decoded greedily. A score is the last number of an answer (NUMBER) over 5. An answer without a number
up to 5 scores 0, as FlowGRPO has it, but the run stops where no answer has had one yet. The answers are the second
thing returned.
SPDX-License-Identifier: MIT
"""
import functools
import os
import pathlib
import re
import sys
import types

import torch

sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[:2])
import nft
from named_rewards import fetching

MODEL = os.environ.get("NFT_VLM", "CodeGoat24/UnifiedReward-qwen-3b")
TEMPLATE = os.environ.get("NFT_VLM_TEMPLATE", """\
This image was generated from a text caption. Judge it by two things: does it show what the caption says, every \
object with its attributes, number and place; and is it a good picture, clear, undistorted and pleasant to look at? \
Then give one score from 1 (bad) to 5 (excellent), decimals allowed. End with the line "Final Score: " and the number.
Text Caption: [{prompt}]""")
HIGHEST = 5                                             # the score that becomes 1
NUMBER = r"(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*\d+)?"   # "4.5", and the 4 of "4/5" and "4 out of 5"
TOKENS = 512                                            # longest answer; one cut off there is read as it stands


def read(answer):
    """An answer -> its last number over HIGHEST, in [0, 1]; None where there is no such number."""
    numbers = re.findall(NUMBER, answer)
    score = float(numbers[-1]) / HIGHEST if numbers else 2
    return score if score <= 1 else None


@functools.cache
def load(device):
    """The model in fp32, its processor, and whether an answer has been readable yet."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
    with fetching(MODEL):                           # False also keeps transformers from asking on the terminal
        processor = AutoProcessor.from_pretrained(MODEL, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32, trust_remote_code=False)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"                     # answers go on from the last token of a question
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # The repository's own settings go: they may sample, and a repetition penalty would see the batch's padding
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=TOKENS, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id)
    return types.SimpleNamespace(model=model.to(device), processor=processor, readable=False)


def ask(judge, images, prompts):
    """(B, 3, H, W) in [0, 1] and B strings -> B answers."""
    chats = [[{"role": "user", "content": [{"type": "image", "image": nft.to_pil(image)},
                                           {"type": "text", "text": TEMPLATE.replace("{prompt}", prompt)}]}]
             for image, prompt in zip(images, prompts)]
    given = judge.processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True}).to(images.device)
    tokens = judge.model.generate(**given)[:, given["input_ids"].shape[1]:]
    return judge.processor.batch_decode(tokens, skip_special_tokens=True)


@torch.no_grad()
def reward(images, prompts, metadata):
    """(B, 3, H, W) in [0, 1] and B strings -> B scores in [0, 1], and the answers they were read from."""
    judge = load(images.device)
    answers = ask(judge, images, prompts)
    scores = [read(answer) for answer in answers]
    judge.readable |= any(score is not None for score in scores)
    if not judge.readable:
        nft.refuse(f"NFT_VLM={MODEL} answered {answers[0]!r:.200}: must give a number up to {HIGHEST}; "
                   "change NFT_VLM_TEMPLATE, or take another model")
    return [score or 0.0 for score in scores], {"answers": answers}
