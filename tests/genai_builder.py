"""The model builder of onnxruntime-genai, with its own arguments, on either side of transformers 5.

It imports classes of models that transformers 4.57 has not, whatever it builds; they are needed for those models only.
"""

import runpy

import transformers

for name in ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"):
    if not hasattr(transformers, name):
        setattr(transformers, name, None)
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
