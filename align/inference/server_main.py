"""Main module of the vLLM servers that align starts: ``python -m align.inference.server_main OPTIONS``.

vLLM starts its engine and its workers by ``spawn``, and Python then imports the main module again in each of them. With
``vllm.entrypoints.openai.api_server`` that is the whole API server, here it is nothing.
"""

if __name__ == "__main__":
    # Of vLLM 0.31; what `vllm serve` runs, too.
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
