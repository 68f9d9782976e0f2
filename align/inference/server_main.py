"""Main module of the vLLM servers that align starts: ``python -m align.inference.server_main OPTIONS``.

vLLM starts its engine and its workers by ``spawn``, and Python then imports the main module again in each of them. With
``vllm.entrypoints.openai.api_server`` that is the whole API server, here it is nothing.
"""

import runpy

SERVER = "vllm.entrypoints.openai.api_server"
"""Module behind ``vllm serve``; that command itself does not start from the CPU build."""

if __name__ == "__main__":
    # Without ``alter_sys``, this module stays the main one for ``spawn``.
    runpy.run_module(SERVER, run_name="__main__")
