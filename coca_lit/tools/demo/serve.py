"""Serves the page to this machine only, with its style. Neither gradio nor the browser contacts another machine, and no
page of another name that resolves to this machine reads it.
"""

import logging
from collections.abc import Callable
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response

from coca_lit.errors import ConfigError

HOST = "127.0.0.1"
MAX_UPLOAD = "30mb"
# The browser refuses requests of any library to another machine.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
FONTS = ["system-ui", "sans-serif"]
STYLE = """
.gradio-container { max-width: 1240px !important; margin: auto; }
#banner h1 { font-size: 1.5rem; margin: 0 0 .2rem; }
#banner p { margin: .1rem 0; opacity: .8; }
#banner code { font-size: .9em; overflow-wrap: anywhere; }
#banner summary { cursor: pointer; opacity: .7; font-size: .9em; }
#banner .note { border-left: 4px solid var(--primary-500); padding: .35rem .8rem; margin-top: .6rem; opacity: 1;
  background: var(--background-fill-secondary); border-radius: 4px; }
.best { font-size: 1.35rem; font-weight: 600; line-height: 1.35; padding: .4rem 0 .9rem; }
.captions { width: 100%; border: 0 !important; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.captions tr { border: 0 !important; }
.captions th, .captions td { border: 0 !important; text-align: right !important; padding: .45rem .7rem !important; }
.captions th { font-size: .85rem; opacity: .75; }
.captions td { border-top: 1px solid var(--border-color-primary) !important; }
.captions th:first-child, .captions td:first-child { text-align: left !important; width: 60%; }
.captions tr.first td { font-weight: 600; background: var(--background-fill-primary); }
.hint { opacity: .7; }
.ask { border: 2px dashed var(--primary-500); border-radius: 6px; padding: 1rem; margin-top: .6rem;
  text-align: center; }
#captions .hint { font-size: .85rem; margin-top: .6rem; }
.maps { display: flex; flex-wrap: wrap; gap: .4rem; }
.maps figure { margin: 0; width: 96px; }
.maps img { width: 96px; border-radius: 4px; }
.maps figcaption { text-align: center; font-size: .8rem; overflow-wrap: anywhere; }
.grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
#examples .grid-wrap, #found .grid-wrap { height: auto !important; min-height: 0 !important;
  max-height: none !important; }
#found .thumbnail-item { display: flex; flex-direction: column; height: auto; aspect-ratio: auto; }
#found .thumbnail-item img { aspect-ratio: 1; height: auto; }
#found .caption-label { position: static; max-width: 100%; border: 0; box-shadow: none; font-size: .75rem;
  text-align: left; white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  #found .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  .captions th, .captions td { padding: .35rem .3rem !important; font-size: .8rem; }
}
"""


LOOK: dict[str, Any] = {  # arguments of `gr.Blocks.launch`, wherever the page is
    "ssr_mode": False,
    "max_file_size": MAX_UPLOAD,
    "footer_links": [],
    "theme": gr.themes.Soft(primary_hue="indigo", font=FONTS, font_mono=["ui-monospace", "monospace"]),
    "css": STYLE,
}


def serve(page: gr.Blocks, port: int | None, open_browser: bool = False, wait: bool = True) -> str:
    """Serves the page on 127.0.0.1 until the process is stopped, or in the background without `wait`.

    Args:
        port: None takes a free one.

    Returns:
        The address of the page.

    Raises:
        ConfigError: the port is taken, or none is free.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # logs each of our own requests
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            **LOOK,
            app_kwargs={
                "middleware": [
                    Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False),
                    Middleware(BaseHTTPMiddleware, dispatch=_only_here),
                ]
            },
        )
    except OSError as error:
        if port is None:
            raise ConfigError(f"no port is free ({error}): choose one, e.g. port=9000") from error
        raise ConfigError(f"port {port} is taken; choose another one, e.g. port={port + 1}") from error
    print(f"the page is at {address} (Ctrl+C ends it)", flush=True)
    if wait:
        page.block_thread()
    return address


async def _only_here(request: Request, call_next: Callable[[Request], Any]) -> Response:
    response: Response = await call_next(request)
    response.headers["Content-Security-Policy"] = POLICY
    return response
