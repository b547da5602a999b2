"""The decoder on awkward files. Each frame carries its number as stripes, so that what comes out can be read back;
expected moments and colours are those that went in, not what another decoder says."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from egom2p.data.video import FrameStream, Losses, NoVideo, decode_video, frame_times, shown, square
from egom2p.errors import UserError


def coded(number: int, height: int = 96, width: int = 96) -> np.ndarray:
    """Eight black or white stripes across the centred square: the bits of the number."""
    frame = np.full((height, width, 3), 128, np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    for bit in range(8):
        stripe = slice(left + bit * side // 8, left + (bit + 1) * side // 8)
        frame[top : top + side, stripe] = 235 if number >> bit & 1 else 20
    return frame


def number_of(frame: np.ndarray) -> int:
    side = frame.shape[1]
    middle = slice(side // 2 - 2, side // 2 + 2)
    return sum(int(frame[middle, int((bit + 0.5) * side / 8)].mean() > 128) << bit for bit in range(8))


def write(path: Path, frames, fps: int = 30, codec: str = "libx264", pix_fmt: str = "yuv420p", seconds=None,
          options: dict | None = None, prepare=None, time_base: Fraction = Fraction(1, 90000)) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = {"crf": "8", "preset": "fast"} if options is None else options
        if seconds is not None:
            stream.codec_context.time_base = time_base
        if prepare:
            prepare(stream)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if seconds is not None:
                picture.pts, picture.time_base = round(seconds[index] / time_base), time_base
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def seen(path: Path, losses: Losses | None = None) -> list[tuple[float, int]]:
    return [(frame.time, number_of(frame.picture())) for frame in shown(path, losses)]


def test_plain_frames_are_all_there_at_their_times(tmp_path):
    path = write(tmp_path / "a.mp4", [coded(i) for i in range(40)], fps=25)
    rows = seen(path)
    assert [n for _, n in rows] == list(range(40))
    assert np.allclose([t for t, _ in rows], np.arange(40) / 25, atol=1e-3)
    assert np.allclose(frame_times(path), np.arange(40) / 25, atol=1e-3)
    frames, rate = decode_video(path.read_bytes())
    assert frames.shape == (40, 96, 96, 3)
    assert rate == pytest.approx(25, rel=0.01)


ONE = 0x10000
TURNS = {  # display matrix -> what it does to the stored picture
    "as it is": ([ONE, 0, 0, ONE], lambda p: p),
    "quarter": ([0, ONE, -ONE, 0], lambda p: np.rot90(p, 3)),
    "half": ([-ONE, 0, 0, -ONE], lambda p: np.rot90(p, 2)),
    "three quarters": ([0, -ONE, ONE, 0], lambda p: np.rot90(p, 1)),
    "mirror": ([-ONE, 0, 0, ONE], lambda p: p[:, ::-1]),
    "upside down": ([ONE, 0, 0, -ONE], lambda p: p[::-1]),
    "transposed": ([0, ONE, ONE, 0], lambda p: p.swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", TURNS)
def test_the_display_matrix_turns_and_mirrors(tmp_path, name):
    """ISO 14496-12, 6.2.2: the track header's matrix maps stored pixels to shown ones."""
    (a, b, c, d), expected = TURNS[name]
    stored = np.zeros((64, 96, 3), np.uint8)
    for rows, columns, colour in ((slice(0, 32), slice(0, 48), [200, 20, 20]),
                                  (slice(0, 32), slice(48, 96), [20, 200, 20]),
                                  (slice(32, 64), slice(0, 48), [20, 20, 200]),
                                  (slice(32, 64), slice(48, 96), [200] * 3)):
        stored[rows, columns] = colour
    path = write(tmp_path / "a.mp4", [stored] * 5)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    at += 40 if data[at] == 0 else 52
    matrix = [a, b, 0, c, d, 0, 0, 0, 0x40000000]
    data[at : at + 36] = b"".join((v & 0xFFFFFFFF).to_bytes(4, "big") for v in matrix)
    path.write_bytes(bytes(data))
    picture = next(shown(path)).picture().astype(int)
    wanted = expected(stored).astype(int)
    assert picture.shape == wanted.shape
    for corner in ((8, 8), (8, -8), (-8, 8), (-8, -8)):
        assert np.abs(picture[corner] - wanted[corner]).max() < 25


@pytest.mark.parametrize(("ratio", "size"), [(Fraction(2, 1), (96, 192)), (Fraction(1, 2), (192, 96))])
def test_pixels_that_are_not_square_are_stretched(tmp_path, ratio, size):
    frame = np.full((96, 96, 3), 30, np.uint8)
    rows, columns = (32, 16) if ratio > 1 else (16, 32)
    frame[32 : 32 + rows, 40 : 40 + columns] = 220

    def pixels(stream):
        stream.codec_context.sample_aspect_ratio = ratio

    picture = next(shown(write(tmp_path / "film.mp4", [frame] * 5, prepare=pixels))).picture()
    assert picture.shape == (*size, 3)
    bright = picture.mean(-1) > 120
    assert abs(int(bright.any(1).sum()) - int(bright.any(0).sum())) <= 2


def test_variable_rates_and_late_clocks_give_the_nearest_frame(tmp_path):
    """Bursts at 60 fps with pauses of 0.45 s, on a clock that starts at 12.3 s."""
    times = [0.0]
    while times[-1] < 4:
        times += [times[-1] + (i + 1) / 60 for i in range(6)]
        times.append(times[-1] + 0.45)
    path = write(tmp_path / "v.mkv", [coded(i) for i in range(len(times))], seconds=[12.3 + t for t in times],
                 time_base=Fraction(1, 1000))
    stream = FrameStream(path, 8, 96)
    got = [times[number_of(frame)] for frame in stream]
    moments = np.arange(len(got)) / 8
    nearest = np.abs(np.array(times)[:, None] - moments).min(0)
    assert np.all(np.abs(np.array(got) - moments) - nearest < 2e-3)
    assert times[-1] < stream.seconds < times[-1] + 0.5


@pytest.mark.parametrize("seconds", [0.7, 2.0, 3.1])
def test_a_stream_ends_where_the_recording_ends(tmp_path, seconds):
    stream = FrameStream(write(tmp_path / "a.mp4", [coded(i) for i in range(round(30 * seconds))]), 8, 32)
    frames = list(stream)
    assert stream.seconds == pytest.approx(seconds, abs=0.01)
    assert len(frames) == int(np.ceil(seconds * 8 - 1e-6))


def test_what_an_edit_list_hides_is_not_shown(tmp_path):
    """Cut without re-encoding: packets from the key frame before the cut are kept with negative times."""
    whole = write(tmp_path / "whole.mp4", [coded(i) for i in range(120)], options={"crf": "8", "g": "250", "bf": "2"})
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        shift = round(0.5 / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                out.mux(packet)
    rows = seen(tmp_path / "cut.mp4")
    assert [n for _, n in rows] == list(range(15, 120))
    assert np.allclose([t for t, _ in rows], np.arange(105) / 30, atol=2e-3)
    assert len(frame_times(tmp_path / "cut.mp4")) == 105


@pytest.mark.parametrize(("name", "codec", "options"), [
    ("xvid.avi", "mpeg4", {"qscale": "2", "bf": "2", "g": "30"}),
    ("h264.avi", "libx264", {"crf": "8", "bf": "3", "g": "60"}),
    ("altref.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "2M", "cpu-used": "4"})])
def test_containers_without_presentation_times(tmp_path, name, codec, options):
    path = write(tmp_path / name, [coded(i) for i in range(90)], codec=codec, options=options)
    rows = seen(path)
    assert [n for _, n in rows] == list(range(90))
    assert np.allclose([t for t, _ in rows], np.arange(90) / 30, atol=0.04)
    of_packets = frame_times(path)  # some of which show nothing (WebM's alternate references)
    assert np.abs(of_packets[:, None] - [t for t, _ in rows]).min(0).max() < 2e-3
    assert len(of_packets) == 90 or name.endswith("webm")


def test_a_cover_picture_is_no_film(tmp_path):
    path = tmp_path / "cover.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 128
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        film = container.add_stream("libx264", rate=30)
        film.width = film.height = 96
        film.pix_fmt = "yuv420p"
        film.options = {"crf": "8"}
        grey = av.VideoFrame.from_ndarray(np.full((128, 128, 3), 77, np.uint8), format="rgb24")
        container.mux(cover.encode(grey.reformat(format="yuvj420p")))
        container.mux(cover.encode())
        for i in range(20):
            container.mux(film.encode(av.VideoFrame.from_ndarray(coded(i), format="rgb24")))
        container.mux(film.encode())
    assert [n for _, n in seen(path)] == list(range(20))


@pytest.mark.parametrize("pix_fmt,codec", [("yuv420p10le", "libx264"), ("gray", "ffv1"), ("gray10le", "ffv1"),
                                           ("yuv444p", "ffv1"), ("argb", "qtrle")])
def test_pixel_formats(tmp_path, pix_fmt, codec):
    height, width = (130, 98) if codec == "libx264" else (131, 97)
    path = write(tmp_path / ("a.mov" if codec == "qtrle" else "a.mkv"), [coded(i, height, width) for i in range(12)],
                 codec=codec, pix_fmt=pix_fmt, options={})
    frames = [frame.picture() for frame in shown(path)]
    assert frames[0].shape == (height, width, 3)
    assert [number_of(square(f[None], 96)[0]) for f in frames] == list(range(12))


def test_sixteen_bit_depth_and_nothing_less(tmp_path):
    depth = (np.arange(96 * 96).reshape(96, 96) * 7).astype(np.uint16)
    for name, pix_fmt in (("d16.mkv", "gray16le"), ("d8.mkv", "gray")):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("ffv1", rate=30)
            stream.width = stream.height = 96
            stream.pix_fmt = pix_fmt
            picture = av.VideoFrame.from_ndarray(depth, format="gray16le")
            container.mux(stream.encode(picture.reformat(format=pix_fmt)))
            container.mux(stream.encode())
    assert np.array_equal(next(shown(tmp_path / "d16.mkv", gray16=True)).picture(), depth)
    with pytest.raises(UserError, match="16-bit grey"):
        next(shown(tmp_path / "d8.mkv", gray16=True))


def damage(source: Path, path: Path, lost: set[int]) -> Path:
    """A copy whose packets of these numbers hold nonsense."""
    with av.open(str(source)) as reader, av.open(str(path), "w") as out:
        stream = reader.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for index, packet in enumerate(reader.demux(stream)):
            if packet.dts is None:
                continue
            if index in lost:
                bad = av.Packet(bytes([0, 0, 0, 9, 0xFF] * 40))
                bad.pts, bad.dts, bad.time_base = packet.pts, packet.dts, packet.time_base
                packet = bad
            packet.stream = copy
            out.mux(packet)
    return path


@pytest.mark.parametrize("kind", ["mkv", "avi"])
def test_damage_costs_its_frames_and_no_wrong_one_comes_out(tmp_path, kind):
    whole = write(tmp_path / f"w.{kind}", [coded(i) for i in range(240)], options={"crf": "8", "g": "30", "bf": "0"})
    losses = Losses()
    rows = seen(damage(whole, tmp_path / f"one.{kind}", {121}), losses)
    assert losses.packets == 1
    assert len(rows) == 239
    assert all(abs(n - round(t * 30)) <= 1 for t, n in rows)
    losses = Losses()
    rows = seen(damage(whole, tmp_path / f"run.{kind}", set(range(125, 131))), losses)
    assert losses.packets == 6
    assert 205 < len(rows) < 235  # the rest of that group of pictures goes too
    assert all(abs(n - round(t * 30)) <= 1 for t, n in rows)
    with pytest.raises(UserError, match="6 damaged packets"):
        decode_video(tmp_path / f"run.{kind}")
    numbers = [n for _, n in seen(damage(whole, tmp_path / f"end.{kind}", {125, 126, 127}))]
    assert set(range(128, 240)) <= set(numbers)  # what is lost right before a key frame costs nothing after it
    assert not {125, 126, 127} & set(numbers)


@pytest.mark.parametrize(("codec", "options"), [("ffv1", {"g": "1"}), ("libx264", {"crf": "8", "g": "6", "bf": "0"})])
def test_a_lost_packet_of_an_avi_costs_its_own_frame_alone(tmp_path, codec, options):
    """However many frames the decoder works on at once: an error belongs to the packet that it came of."""
    whole = write(tmp_path / "w.avi", [coded(i) for i in range(120)], codec=codec, options=options)
    losses = Losses()
    rows = seen(damage(whole, tmp_path / "one.avi", {12}), losses)
    assert losses.packets == 1 and {n for _, n in rows} >= set(range(18, 120))
    # Of the lost frame's group some are patched up.
    assert all(abs(n - round(t * 30)) <= (12 <= n < 18) for t, n in rows)


def test_a_recording_that_was_cut_off_is_read_to_the_cut(tmp_path):
    whole = write(tmp_path / "w.mkv", [coded(i) for i in range(200)], options={"crf": "8", "g": "15"}).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: int(len(whole) * 0.6)])
    rows = seen(tmp_path / "cut.mkv")
    assert 80 < len(rows) < 160
    assert all(n == round(t * 30) for t, n in rows)
    assert rows[-1][1] - len(rows) < 3  # of a group that needs what was cut, a frame may be missing


def test_files_that_are_no_video_say_what_they_are(tmp_path):
    whole = write(tmp_path / "w.mp4", [coded(i) for i in range(30)]).read_bytes()
    for name, data, words, never in (
            ("empty.mp4", b"", "0 bytes", True),
            ("pointer.mp4", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull",
             True),
            ("text.mp4", b"hello\n" * 50, "cannot be decoded", True),
            ("moov.mp4", whole[: whole.index(b"moov") - 4], "untrunc", False)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=words) as raised:
            list(shown(tmp_path / name))
        assert isinstance(raised.value, NoVideo) == never
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(NoVideo, match="is a folder"):
        list(shown(tmp_path / "folder.mp4"))


def test_the_authors_example_clips(examples):
    for name in ("rgb2dep_h2o.mp4", "dep2rgb_holo.mp4"):
        frames, rate = decode_video(examples / name)
        assert frames.shape == (16, 256, 256, 3)
        assert rate == pytest.approx(8)


def test_joined_transport_streams_go_on_where_the_clock_starts_anew(tmp_path):
    """`cat a.ts b.ts`: packets and pictures are of one clock, so that side files by frame number fit."""
    parts = [write(tmp_path / f"{i}.ts", [coded(i * 60 + n) for n in range(60)], codec="mpeg2video",
                   options={"qscale": "2", "bf": "2"}) for i in range(2)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(p.read_bytes() for p in parts))
    times, of_packets = [t for t, _ in seen(path)], frame_times(path)
    assert len(times) >= 118 and times[-1] > 3.8  # the last part's first pictures may be doubtful to the decoder
    assert of_packets[-1] > 3.8 and np.diff(of_packets).min() > 0.02
    assert np.abs(of_packets[:, None] - times).min(0).max() < 0.02


def test_a_film_that_begins_between_key_frames_has_no_frames_before_the_first(tmp_path):
    whole = write(tmp_path / "whole.mkv", [coded(i) for i in range(90)],
                  options={"crf": "8", "g": "30", "x264-params": "open-gop=1:bframes=3:scenecut=0:keyint=30"})
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if number >= 20 and packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    rows, of_packets = seen(tmp_path / "cut.mkv"), frame_times(tmp_path / "cut.mkv")
    assert 0 < len(rows) < 70
    assert len(of_packets) == len(rows) and np.allclose(of_packets, [t for t, _ in rows], atol=2e-3)
