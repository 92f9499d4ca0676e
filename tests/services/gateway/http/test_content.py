"""What would make the engine fetch, load or run something is refused, wherever it stands."""

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.services.bench_fleet import Bench
from vcot.services.gateway.http.answers import Refusal
from vcot.services.gateway.http.content import OPENAI_FIELDS, VLLM_FIELDS, check_content, check_size

DATA = "data:image/png;base64,aW1hZ2U="
WEB = "http://169.254.169.254/latest/meta-data"


def parts(*content: Any) -> dict[str, Any]:
    return {"model": "policy", "messages": [{"role": "user", "content": list(content)}]}


def image(url: Any) -> dict[str, Any]:
    return parts({"type": "image_url", "image_url": {"url": url}})


def refused(request: dict[str, Any], *hosts: str) -> str:
    with pytest.raises(Refusal) as caught:
        check_content(request, hosts, 10**6)
    assert caught.value.status == 400
    return caught.value.code


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": WEB}},
        {"type": "image_url", "image_url": WEB},
        {"image_url": WEB},
        {"image_url": {"url": WEB, "detail": "low"}},
        {"type": "text", "text": "x", "image_url": WEB},
        {"type": "input_image", "image_url": WEB},
        {"type": "input_image", "image_url": {"url": WEB}},
        {"type": "video_url", "video_url": {"url": WEB}},
        {"type": "audio_url", "audio_url": {"url": WEB}},
        {"video_url": WEB},
        {"audio_url": WEB},
        {"type": "image_url", "image_url": [DATA, WEB]},
        {"type": "image_url", "image_url": {"url": [DATA, {"url": WEB}]}},
        [[{"type": "image_url", "image_url": {"url": WEB}}]],
        {"type": "tool_result", "content": [{"type": "image_url", "image_url": {"url": WEB}}]},
        {"image_url": DATA, "video_url": WEB},
    ],
)
def test_a_url_is_seen_wherever_it_stands(part: Any) -> None:
    assert refused(parts({"type": "text", "text": "What is it?"}, part)) == "url_refused"


def test_a_url_is_seen_in_every_message() -> None:
    good, bad = image(DATA)["messages"], image(WEB)["messages"]
    assert refused({"messages": [*good, *bad]}) == "url_refused"
    assert refused({"messages": [good, bad]}) == "url_refused"
    assert refused({"messages": [{"role": "user", "content": bad[0]["content"][0]}]}) == "url_refused"


@pytest.mark.parametrize(
    "url",
    [
        WEB,
        "HTTP://169.254.169.254/",
        " http://x.org/a.png",
        " data:image/png;base64,aW1hZ2U=",
        "\tdata:image/png,x",
        "da\nta:image/png,x",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "file:/etc/passwd",
        "/etc/passwd",
        "//x.org/a.png",
        "ftp://x.org/a.png",
        "blob:http://x.org/",
        "data",
        "data\uff1aimage/png,x",
        "",
    ],
)
def test_only_data_urls_pass(url: str) -> None:
    assert refused(image(url)) == "url_refused"


@pytest.mark.parametrize("url", [DATA, DATA.upper(), "DaTa:image/png;base64,eA=="])
def test_data_urls_pass(url: str) -> None:
    check_content(image(url), (), 10**6)
    check_content(parts({"type": "input_image", "image_url": url}, {"image_url": url}), (), 10**6)


def test_a_url_in_a_text_is_only_text() -> None:
    check_content(parts({"type": "text", "text": f"image_url {WEB}"}), (), 10**6)
    check_content({"messages": [{"role": "user", "content": WEB}]}, (), 10**6)


@pytest.mark.parametrize(
    "url",
    ["http://img.org", "https://img.org/a.png?b=c", "HTTPS://IMG.ORG/@a", "https://own:8443/x", "https://img.org?x"],
)
def test_an_allowed_host_passes(url: str) -> None:
    check_content(image(url), ("img.org", "own:8443"), 10**6)


@pytest.mark.parametrize(
    "url",
    [
        "https://other.org/",
        "https://img.org.evil.org/",
        "https://evil-img.org/",
        "https://sub.img.org/",
        "https://img.org:22/",
        "https://own/",
        "https://img.org@evil.org/",
        "https://user:pw@img.org/",
        "https://evil.org\\@img.org/",
        "https://img.org\\.evil.org/",
        "https://evil.org#@img.org/",
        "https://img.org/a b",
        "https://img.org/\n",
        "https://img.org/\x00",
        "https:img.org/",
        "https:///img.org/",
        "ftp://img.org/",
        "file://img.org/etc/passwd",
        "https://img.org./",
        "https://[::1]/",
        "https://\u0131mg.org/",
    ],
)
def test_an_allowed_host_is_not_taken_for_another(url: str) -> None:
    assert refused(image(url), "img.org", "own:8443") == "url_refused"


@pytest.mark.parametrize(
    "name",
    [
        "mm_processor_kwargs",
        "media_io_kwargs",
        "chat_template",
        "prompt_embeds",
        "kv_transfer_params",
        "ec_transfer_params",
    ],
)
def test_fields_that_reach_further_than_the_prompt_are_refused(name: str) -> None:
    assert refused(image(DATA) | {name: {"trust_remote_code": True}}) == "field_refused"
    check_content(image(DATA) | {name: None}, (), 10**6)


@pytest.mark.parametrize("name", ["image_pil", "image_embeds", "audio_embeds", "video_embeds", "prompt_embeds"])
def test_parts_that_are_not_images_of_the_clients_are_refused(name: str) -> None:
    assert refused(parts({"type": name, "data": "x"})) == "field_refused"
    assert refused(parts({name: "/etc/passwd"})) == "field_refused"


def test_a_clients_cache_key_for_an_image_is_refused() -> None:
    assert refused(parts({"type": "image_url", "image_url": {"url": DATA}, "uuid": "x"})) == "field_refused"
    assert refused(parts({"image_url": None, "uuid": "x"})) == "field_refused"


@pytest.mark.parametrize(
    "name", ["vllm_xargs", "chat_template_kwargs", "documents", "priority", "add_special_tokens", "no_such_field"]
)
def test_a_field_that_is_not_named_is_refused(name: str) -> None:
    assert refused(image(DATA) | {name: {}}) == "field_refused"


def test_a_mistyped_field_is_named() -> None:
    with pytest.raises(Refusal, match=r"'temprature' .* \(did you mean temperature\?\)"):
        check_content(image(DATA) | {"temprature": 0.5}, (), 10**6)


def test_openais_and_the_named_fields_pass() -> None:
    check_content(dict.fromkeys(OPENAI_FIELDS | VLLM_FIELDS) | {"temperature": 0.5, "top_k": 3}, (), 10**6)


@pytest.mark.parametrize(
    "request_", [{"temperature": 1e999}, {"logit_bias": {"1": -1e999}}, {"stop": [[float("nan")]]}]
)
def test_a_number_that_json_cannot_say_is_refused(request_: dict[str, Any]) -> None:
    assert refused(request_) == "invalid_json"


@pytest.mark.parametrize("name", ["n", "best_of"])
def test_choices_are_bounded(name: str) -> None:
    check_content({name: 128}, (), 10**6)
    assert refused({name: 129}) == "too_many_choices"


def test_a_body_of_many_values_is_refused_before_it_is_read() -> None:
    check_size(b'"' + b"a" * 10**6 + b'"')
    check_size(b"[" + b"{}," * 1_000 + b"{}]")
    for body in (b"[" + b"{}," * 10**6 + b"{}]", b"[" + b"1," * 10**6 + b"1]"):
        with pytest.raises(Refusal, match="JSON objects and arrays") as caught:
            check_size(body)
        assert caught.value.status == 413


def picture(kind: str, side: int, **options: Any) -> str:
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
def test_an_image_is_bounded_by_its_header(kind: str) -> None:
    check_content(image(picture(kind, 1_000)), (), 10**6)
    assert refused(image(picture(kind, 1_001))) == "image_too_large"


def test_a_header_behind_much_else_is_found() -> None:
    assert refused(image(picture("jpeg", 1_001, exif=b"Exif\0\0" + b"x" * 60_000))) == "image_too_large"


def test_a_bomb_is_refused_whatever_the_bound() -> None:
    bomb = picture("png", 20_000)
    with pytest.raises(Refusal, match="scale it down"):
        check_content(image(bomb), (), 10**8)


def encoded(raw: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(raw).decode()}"


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of those chunks."""
    made = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def ihdr(side: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)


END = ((b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))


@pytest.mark.parametrize("between", [b"", b"x" * 5_000])
def test_the_largest_of_several_headers_counts(between: bytes) -> None:
    """A decoder takes the last."""
    assert refused(image(encoded(png(ihdr(8), (b"tEXt", b"a\0" + between), ihdr(1_001), *END)))) == "image_too_large"
    assert refused(image(encoded(png((b"tEXt", b"a\0" + between), ihdr(1_001), *END)))) == "image_too_large"
    small, large = (base64.b64decode(picture("jpeg", side).partition(",")[2]) for side in (8, 1_001))
    frame, other = (found[found.index(b"\xff\xc0") :][:13] for found in (small, large))
    comment = b"\xff\xfe" + struct.pack(">H", len(between) + 2) + between
    assert refused(image(encoded(small.replace(frame, frame + comment + other)))) == "image_too_large"
    check_content(image(encoded(small.replace(frame, frame + comment))), (), 10**6)


@pytest.mark.parametrize("between", [b"\xff\xff", b"\xff\xd0", b"\xff\xfe\0\0"])
def test_odd_markers_hide_no_size(between: bytes) -> None:
    large = base64.b64decode(picture("jpeg", 1_001).partition(",")[2])
    assert refused(image(encoded(large[:2] + between + large[2:]))) == "image_too_large"


@pytest.mark.parametrize("kind", ["ico", "icns", "pcx", "ppm", "sgi", "tga", "im", "dds", "qoi", "jpeg2000"])
def test_formats_whose_header_promises_nothing_are_refused(kind: str) -> None:
    """An icon of 256 pixels may hold a PNG of 30,000."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, kind)
    assert refused(image(encoded(buffer.getvalue()))) == "image_refused"


@pytest.mark.parametrize(
    "prefix", ["data:image/png,", "data:,", "data:image/png;base32,", 'data:image/png;n="a,b";base64,']
)
def test_a_data_url_that_parsers_read_differently_is_refused(prefix: str) -> None:
    assert refused(image(prefix + picture("png", 1_001).partition(",")[2])) == "image_refused"


@pytest.mark.parametrize("change", [lambda d: "\n".join(d), lambda d: "!" * 4_000 + d, lambda d: "====" + d])
def test_what_is_no_base64_hides_no_image(change: Any) -> None:
    data = change(picture("png", 1_001).partition(",")[2])
    assert refused(image(f"data:image/png;base64,{data}")) == "image_too_large"


@pytest.mark.parametrize("params", ["", ";charset=x", ";a=b;c=d"])
def test_parameters_of_a_data_url_hide_no_image(params: str) -> None:
    data = picture("png", 1_001).partition(",")[2]
    assert refused(image(f"data:image/png{params};base64,{data}")) == "image_too_large"
    assert refused(image(f"data:{params};base64,{data}")) == "image_too_large"


@pytest.mark.parametrize("role", ["assistant", "system", "tool", "developer"])
def test_an_image_counts_in_every_role(role: str) -> None:
    content = image(picture("png", 1_001))["messages"][0]["content"]
    assert refused({"messages": [{"role": role, "content": content}]}) == "image_too_large"


@pytest.mark.parametrize("name", ["video_url", "audio_url"])
def test_only_images_are_served(name: str) -> None:
    assert refused(parts({"type": name, name: {"url": "data:video/mp4;base64,AAAA"}})) == "field_refused"
    assert refused(parts({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}})) == "field_refused"


@pytest.mark.parametrize("name", ["n", "best_of"])
@pytest.mark.parametrize("value", ["4000", " 4000 ", "4e3", "4000.0", [4000], {"n": 4000}, True])
def test_a_number_of_choices_is_a_number(name: str, value: Any) -> None:
    """vLLM takes "4000" for 4000."""
    assert refused({name: value}) == "invalid_request_error"
    check_content({name: None}, (), 10**6)


def test_prompts_count_as_choices_do() -> None:
    check_content({"prompt": ["x"] * 128, "n": 4}, (), 10**6)
    check_content({"prompt": list(range(2_000)), "n": 8}, (), 10**6)  # one prompt, of tokens
    assert refused({"prompt": ["x"] * 129, "n": 4}) == "too_many_choices"
    assert refused({"prompt": [[1, 2]] * 513}) == "too_many_choices"


@pytest.mark.parametrize(
    "request_",
    [
        {"stop": ["x"] * 65},
        {"bad_words": ["x"] * 65},
        {"stop_token_ids": list(range(1_025))},
        {"logit_bias": {str(number): 1 for number in range(1_025)}},
        {"logprob_token_ids": list(range(1_025))},
        {"tools": [{}] * 1_025},
        {"response_format": {"json_schema": {"schema": {"enum": ["x" * 1_000] * 200}}}},
        {"structured_outputs": {"regex": "a" * 200_000}},
    ],
)
def test_what_the_engine_goes_through_for_every_token_is_bounded(request_: dict[str, Any]) -> None:
    assert refused(request_) == "too_many_entries"


async def test_the_gateway_checks_before_the_engine_sees_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, allowed_image_hosts=["IMG.org"])
    async with bench.running():
        for url, status in ((WEB, 400), ("https://img.org/a.png", 200), (DATA, 200)):
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "hello"}]
            answer = await bench.ask(messages=[{"role": "user", "content": content}])
            assert answer.status_code == status
        assert WEB not in bench.server.images
        answer = await bench.ask(mm_processor_kwargs={"subfolder": "../.."})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
