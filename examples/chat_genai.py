"""Chat with an exported model in onnxruntime-genai, token by token.

`optimum-cli nm export --model FOLDER --runtime genai`, then `python examples/chat_genai.py FOLDER`. The folder is all
that is needed: weights, graph, tokenizer and the operator library lie in it, and the program knows of none of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator

import onnxruntime_genai as genai


class Chat:
    """A conversation; what was said stays in the key-value cache, and only what is new is read.

    Args:
        folder: an exported model.
        max_length: room for tokens, of the whole conversation.
        temperature: 0 for always the most likely token.
    """

    def __init__(self, folder: str, max_length: int = 2048, temperature: float = 0.0) -> None:
        model = genai.Model(folder)
        self.tokenizer = genai.Tokenizer(model)
        self.stream = self.tokenizer.create_stream()
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=max_length)
        if temperature:
            parameters.set_search_options(do_sample=True, temperature=temperature, top_k=50, top_p=0.95)
        self.generator = genai.Generator(model, parameters)
        self.messages: list[dict[str, str]] = []

    def say(self, text: str, max_new_tokens: int = 256) -> Iterator[str]:
        """Add the user's message, and give the answer piece by piece.

        Raises:
            RuntimeError: the conversation is longer than there is room for.
        """
        before = self._template(add_generation_prompt=False) if self.messages else ""
        self.messages.append({"role": "user", "content": text})
        new = self._template(add_generation_prompt=True).removeprefix(before)
        self.generator.append_tokens(self.tokenizer.encode(new))
        answer = ""
        for _ in range(max_new_tokens):
            self.generator.generate_next_token()
            if self.generator.is_done():
                break
            piece = self.stream.decode(self.generator.get_next_tokens()[0])
            answer += piece
            yield piece
        self.messages.append({"role": "assistant", "content": answer})

    def _template(self, add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            json.dumps(self.messages), add_generation_prompt=add_generation_prompt
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="exported with --runtime genai")
    parser.add_argument("--prompt", help="one message, instead of a conversation")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of each answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    args = parser.parse_args()
    chat = Chat(args.folder, temperature=args.temperature)
    prompts = iter([args.prompt]) if args.prompt else (line.strip() for line in sys.stdin)
    print("" if args.prompt else "> ", end="", flush=True)
    for prompt in prompts:
        start, count = time.perf_counter(), 0
        for piece in chat.say(prompt, args.max_new_tokens):
            count += 1
            print(piece, end="", flush=True)
        print(f"\n[{count / (time.perf_counter() - start):.1f} tokens/s]")
        print("" if args.prompt else "> ", end="", flush=True)


if __name__ == "__main__":
    main()
