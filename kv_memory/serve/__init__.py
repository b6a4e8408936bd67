"""The server: an OpenAI-compatible HTTP API over a store, in FastAPI. Needs the extra `serve`.

`app.create_app` makes the application. Nothing is imported here, so that the command line can show the server's options
without FastAPI and torch.
"""
