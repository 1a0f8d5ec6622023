"""Serving a page to this machine alone. Neither gradio nor the browser asks another machine for anything."""

import logging
from collections.abc import Callable
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response

from coca_lit.demo.look import FONTS, STYLE
from coca_lit.errors import ConfigError

HOST = "127.0.0.1"
MAX_UPLOAD = "30mb"
# The browser refuses whatever a library might want from another machine.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def serve(page: gr.Blocks, port: int | None, open_browser: bool = False, wait: bool = True) -> str:
    """Serves the page at 127.0.0.1, until the process is stopped or, without `wait`, in the background; its address.
    Without a port, a free one is found.

    Raises:
        ConfigError: the port is taken.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every look at our own page
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            max_file_size=MAX_UPLOAD,
            footer_links=[],
            theme=gr.themes.Soft(primary_hue="indigo", font=FONTS, font_mono=["ui-monospace", "monospace"]),
            css=STYLE,
            app_kwargs={"middleware": [Middleware(BaseHTTPMiddleware, dispatch=_only_here)]},
        )
    except OSError as error:
        raise ConfigError(f"port {port} is taken; choose another one, e.g. port={(port or 0) + 1}") from error
    print(f"the page is at {address} (Ctrl+C ends it)", flush=True)
    if wait:
        page.block_thread()
    return address


async def _only_here(request: Request, call_next: Callable[[Request], Any]) -> Response:
    response: Response = await call_next(request)
    response.headers["Content-Security-Policy"] = POLICY
    return response
