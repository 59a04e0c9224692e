"""What files say beside their pixels: through read_photo and write_photo, in every format, whole and damaged."""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from autohdr.data import heif
from autohdr.data.conversion import converted
from autohdr.data.images import photo_layout, read_photo, write_photo

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description'
    b' xmlns:t="http://ns.adobe.com/tiff/1.0/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" xmlns:exif="http://ns.adobe.com/exif/1.0/"'
    b' xmlns:GPano="http://ns.google.com/photos/1.0/panorama/" GPano:ProjectionType="equirectangular" %s</rdf:RDF></x:xmpmeta>'
)
IPTC = b"8BIM\x04\x04\0\0\0\0\0\x05words\0"
THUMBNAIL = b"8BIM\x04\x0c\0\0\0\0\0\x04\xff\xd8\xff\xd9"


def directory(order, said, *entries, tail=b""):
    head = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    return head + struct.pack(order + "H", said) + b"".join(struct.pack(order + "HHI4s", *entry) for entry in entries) + tail


def upright(order, kind="H", type_=3):
    return 0x112, type_, 1, struct.pack(order + kind, 6).ljust(4, b"\0")


def saved(path, **options):
    PICTURE.save(path, **options)
    return path


def again(path):
    """A photo written as it was read, without a word."""
    photo = read_photo(path)
    assert photo.notes == []
    out = path.with_name("again" + path.suffix)
    write_photo(out, photo)
    return out


def png_with(path, *chunks):
    data = saved(path).read_bytes()
    made = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    path.write_bytes(data[:33] + b"".join(made) + data[33:])
    return path


def segments_of(data):
    at = 2
    while data[at + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, at + 2)
        yield data[at + 1], data[at + 4 : at + 2 + length]
        at += 2 + length


@pytest.mark.parametrize("order", ["<", ">"], ids=["II", "MM"])
@pytest.mark.parametrize("kind, type_", [("B", 1), ("H", 3), ("I", 4), ("b", 6), ("h", 8), ("i", 9)])
def test_an_orientation_of_any_integer_type_is_obeyed(tmp_path, order, kind, type_):
    block = directory(order, 1, upright(order, kind, type_), tail=bytes(4))
    path = saved(tmp_path / "a.jpg", exif=b"Exif\0\0" + block)
    photo = read_photo(path)
    assert photo.pixels.shape[:2] == photo_layout(path)[:2] == (48, 32)
    assert Image.open(again(path)).getexif()[0x112] == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["<", ">"], ids=["II", "MM"])
def test_a_damaged_directory_loses_only_what_cannot_be_read(tmp_path, order):
    make = (0x10F, 2, 4, b"Mak\0")
    beyond = (0x110, 2, 100, struct.pack(order + "I", 9999))
    software = (0x131, 2, 8, struct.pack(order + "I", 8 + 2 + 24))  # its value is where the pointer to the next would be
    for block in (
        directory(order, 2, make, upright(order)),
        directory(order, 9, make, upright(order)),
        directory(order, 3, make, upright(order), tail=b"\x01\x0f\x00"),
        directory(order, 3, make, beyond, upright(order), tail=bytes(4)),
        directory(order, 2, upright(order), software, tail=b"Editing\0"),
    ):
        path = saved(tmp_path / "a.jpg", exif=b"Exif\0\0" + block)
        photo = read_photo(path)
        assert photo.pixels.shape[:2] == (48, 32)
        write_photo(tmp_path / "b.jpg", photo)
        with Image.open(tmp_path / "b.jpg") as image:
            tags = dict(image.getexif())
        assert tags[0x112] == 1 and ("Mak" in tags.values() or "Editing" in tags.values())


@pytest.mark.parametrize(
    "where", ['tiff:Orientation="8"/>', "t:Orientation = '8' />", "><tiff:Orientation> 8 </tiff:Orientation></rdf:Description>"]
)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_an_orientation_in_xmp_is_obeyed_and_reset(tmp_path, suffix, where):
    packet = XMP % where.encode()
    path = tmp_path / f"a{suffix}"
    if suffix == ".png":
        png_with(path, (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet))
    elif suffix == ".tif":
        tifffile.imwrite(
            path, np.asarray(PICTURE).astype(np.uint16) * 257, photometric="rgb", extratags=[(700, 1, len(packet), packet)]
        )
    else:
        saved(path, xmp=packet)
    photo = read_photo(path)
    assert photo.pixels.shape[:2] == photo_layout(path)[:2] == (48, 32)
    assert read_photo(again(path)).pixels.shape[:2] == (48, 32)


@pytest.mark.parametrize("name", ["exif", "APP1"])
def test_an_orientation_in_a_png_raw_profile_is_obeyed_and_reset(tmp_path, name):
    block = b"Exif\0\0" + directory(">", 1, upright(">"), tail=bytes(4))
    text = b"\n%s\n%8d\n" % (name.encode(), len(block)) + block.hex().encode() + b"\n"
    path = png_with(tmp_path / "a.png", (b"zTXt", b"Raw profile type %s\0\0" % name.encode() + zlib.compress(text)))
    assert read_photo(path).pixels.shape[:2] == photo_layout(path)[:2] == (48, 32)
    with Image.open(again(path)) as image:
        assert image.size == (32, 48) and ImageOps.exif_transpose(image).size == (32, 48)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_sizes_in_exif_and_xmp_are_those_of_the_upright_photo(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x112] = 6
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] = 48
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageHeight] = 32
    packet = XMP % b'tiff:Orientation="6" exif:PixelXDimension="48"/>'
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet.decode())
    options = {".png": {"pnginfo": info}, ".tif": {}}.get(suffix, {"xmp": packet})
    if suffix == ".tif":
        exif[700] = packet
    path = saved(tmp_path / f"a{suffix}", exif=exif.tobytes(), **options)
    with Image.open(again(path)) as image:
        details = image.getexif().get_ifd(ExifTags.IFD.Exif)
        assert (details[ExifTags.Base.ExifImageWidth], details[ExifTags.Base.ExifImageHeight]) == image.size == (32, 48)
    written = (tmp_path / f"again{suffix}").read_bytes()
    assert b'exif:PixelXDimension="32"' in written and b'tiff:Orientation="1"' in written and b"equirectangular" in written


def test_iptc_comments_and_png_texts_stay_and_thumbnails_go(tmp_path):
    data = saved(tmp_path / "plain.jpg").read_bytes()
    blocks = b"Photoshop 3.0\0" + THUMBNAIL + IPTC
    extra = b"".join(struct.pack(">BBH", 255, kind, len(d) + 2) + d for kind, d in ((0xED, blocks), (0xFE, b"a remark")))
    (tmp_path / "a.jpg").write_bytes(data[:2] + extra + data[2:])
    kept = list(segments_of(again(tmp_path / "a.jpg").read_bytes()))
    assert (0xED, b"Photoshop 3.0\0" + IPTC) in kept and (0xFE, b"a remark") in kept
    path = png_with(tmp_path / "a.png", (b"tEXt", b"Author\0Someone"), (b"pHYs", struct.pack(">IIB", 11811, 11811, 1)))
    with Image.open(again(path)) as image:
        assert image.info["Author"] == "Someone" and round(image.info["dpi"][0]) == 300
    path = saved(tmp_path / "a.tif", tiffinfo={34377: THUMBNAIL + IPTC, 33723: b"iptc"})
    with Image.open(again(path)) as image:
        assert bytes(image.tag_v2[34377]) == IPTC and bytes(image.tag_v2[33723]) == b"iptc"


def test_the_pixel_density_of_a_jpeg_stays_and_turns_with_it(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    path = saved(tmp_path / "a.jpg", dpi=(300, 150), exif=exif)
    with Image.open(again(path)) as image:
        assert image.info["dpi"] == (150, 300)


@pytest.mark.parametrize("size", [70_000, 200_000])
def test_exif_of_more_than_a_segment_stays(tmp_path, size):
    note = bytes(range(256)) * (size // 256)
    block = directory(">", 2, upright(">"), (0x927C, 7, len(note), struct.pack(">I", 38)), tail=bytes(4) + note)
    parts = [b"Exif\0\0" + block[start : start + 60_000] for start in range(0, len(block), 60_000)]
    data = saved(tmp_path / "plain.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(
        data[:2] + b"".join(struct.pack(">BBH", 255, 0xE1, len(p) + 2) + p for p in parts) + data[2:]
    )
    with Image.open(again(tmp_path / "a.jpg")) as image:
        assert image.size == (32, 48) and image.info["exif"].endswith(note)


def test_the_thumbnail_of_an_exif_block_goes(tmp_path):
    picture = b"\xff\xd8thumbnail\xff\xd9"
    first = directory("<", 1, (0x10F, 2, 4, b"Mak\0"), tail=struct.pack("<I", 26))
    second = struct.pack("<HHHIIHHIII", 2, 0x201, 4, 1, 56, 0x202, 4, 1, len(picture), 0)
    path = saved(tmp_path / "a.jpg", exif=b"Exif\0\0" + first + second + picture)
    written = again(path)
    assert b"thumbnail" not in written.read_bytes()
    with Image.open(written) as image:
        assert dict(image.getexif()) == {0x10F: "Mak"}


def test_a_gain_map_and_second_pictures_are_left_out_with_a_word(tmp_path):
    packet = XMP % b'hdrgm:Version="1.0"><Container:Directory><rdf:Seq/></Container:Directory></rdf:Description>'
    path = saved(tmp_path / "a.jpg", xmp=packet)
    photo = read_photo(path)
    assert ["gain map" in note for note in photo.notes] == [True]
    write_photo(tmp_path / "b.jpg", photo)
    written = (tmp_path / "b.jpg").read_bytes()
    assert b"equirectangular" in written and b"hdrgm:Version" not in written and b"Container:Directory" not in written
    PICTURE.save(tmp_path / "mpo.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (6, 4))])
    photo = read_photo(tmp_path / "mpo.jpg")
    assert photo.notes == ["of its 2 pictures the first is in the result"]
    write_photo(tmp_path / "b.jpg", photo)
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.format == "JPEG" and "mp" not in image.info


@pytest.mark.parametrize("format", ["same", "png", "tiff", "webp", "avif"])
def test_a_panorama_stays_one_and_a_gain_map_that_is_gone_is_not_claimed(tmp_path, format):
    """An Ultra-HDR photo as libultrahdr writes it, as ISO 21496-1 has it, and with Adobe's and Google's XMP of the like."""
    light = np.ones((32, 64, 4), np.float16)
    packet = XMP % (
        b'xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" hdrgm:Version="1.0" GPano:FullPanoWidthPixels="64"'
        b' xmlns:Container="http://ns.google.com/photos/1.0/container/" xmlns:Item="http://ns.google.com/photos/1.0/container/item/">'
        b"<hdrgm:GainMapMax><rdf:Seq><rdf:li>2</rdf:li></rdf:Seq></hdrgm:GainMapMax><Container:Directory><rdf:Seq>"
        b'<rdf:li rdf:parseType="Resource"><Container:Item Item:Semantic="GainMap" Item:Length="99"/></rdf:li></rdf:Seq>'
        b"</Container:Directory></rdf:Description>"
    )
    name = b"http://ns.adobe.com/xap/1.0/\0"
    whole = imagecodecs.ultrahdr_encode(light)
    assert b"urn:iso:std:iso:ts:21496:-1" in whole and b"MPF\0" in whole
    said = b"\xff\xe1" + struct.pack(">H", 2 + len(name + packet)) + name + packet
    (tmp_path / "a.jpg").write_bytes(whole[:2] + said + whole[2:])
    photo = converted(read_photo(tmp_path / "a.jpg"), format)
    assert photo.notes == ["its gain map is not in the result, which is the picture for usual screens"]
    write_photo(tmp_path / "b", photo)
    written = (tmp_path / "b").read_bytes()
    assert b'GPano:ProjectionType="equirectangular"' in written and b'GPano:FullPanoWidthPixels="64"' in written
    for word in (b"hdrgm:V", b"hdrgm:G", b"GainMap", b"Container:", b"Item:Semantic", b"21496", b"MPF\0"):
        assert word not in written.replace(b"xmlns:Container:", b""), word
    with Image.open(tmp_path / "b") as image:
        assert image.size == (64, 32) and getattr(image, "n_frames", 1) == 1


def test_films_and_gain_maps_elsewhere_are_left_out_with_a_word(tmp_path, monkeypatch):
    for said in (b'GCamera:MotionPhoto="1">', b"><GCamera:MicroVideo>1</GCamera:MicroVideo>", b'GCamera:MotionPhoto="0">'):
        photo = read_photo(saved(tmp_path / "a.jpg", xmp=XMP % (said + b"</rdf:Description>")))
        assert photo.notes == ["its film is not in the result"] * (b"0" not in said)
        assert b"GCamera:M" not in photo.extra[0][1]
    saved(tmp_path / "a.avif")
    assert read_photo(tmp_path / "a.avif").notes == []
    brands = heif.brands_of(b"\0\0\0\x20ftypavif\0\0\0\0avifmif1tmapMA1B" + bytes(32))
    assert brands == {b"avif", b"mif1", b"tmap", b"MA1B"}
    monkeypatch.setattr(heif, "brands_of", lambda head: brands)  # no encoder at hand writes one
    assert ["gain map" in note for note in read_photo(tmp_path / "a.avif").notes] == [True]


def test_a_jpeg_is_written_with_its_own_tables_and_sampling(tmp_path):
    for quality, subsampling in ((97, 2), (93, 1), (60, 2)):
        path = saved(tmp_path / "a.jpg", quality=quality, subsampling=subsampling)
        reference = io.BytesIO()
        PICTURE.save(reference, "JPEG", quality=max(quality, 90))
        with Image.open(again(path)) as image, Image.open(path) as before:
            assert image.quantization == Image.open(reference).quantization
            assert [component[1:3] for component in image.layer] == [component[1:3] for component in before.layer]
    write_photo(tmp_path / "b.jpg", read_photo(path), quality=40)
    with Image.open(tmp_path / "b.jpg") as image:
        assert sum(image.quantization[0]) > 3 * sum(Image.open(reference).quantization[0])


def test_a_lossless_webp_stays_so(tmp_path):
    path = saved(tmp_path / "a.webp", lossless=True)
    np.testing.assert_array_equal(np.asarray(Image.open(again(path))), np.asarray(PICTURE))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("compression", ["lzw", "zlib", "packbits", "zstd", "lzma", None])
def test_the_compression_of_a_tiff_stays(tmp_path, compression, depth):
    samples = np.asarray(PICTURE).repeat(300, 0) if depth == 8 else np.asarray(PICTURE).astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="rgb", compression=compression)
    with tifffile.TiffFile(again(tmp_path / "a.tif")) as file, tifffile.TiffFile(tmp_path / "a.tif") as before:
        assert file.pages.first.compression == before.pages.first.compression
        np.testing.assert_array_equal(file.asarray(), samples)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_tiff_in_floating_point_stays_so(tmp_path, dtype):
    pixels = np.random.default_rng(0).random((9, 13, 3)).astype(dtype)
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", iccprofile=icc)
    photo = read_photo(tmp_path / "a.tif")
    np.testing.assert_array_equal(photo.pixels, pixels.astype(np.float32))
    written = tifffile.imread(again(tmp_path / "a.tif"))
    assert written.dtype == dtype
    np.testing.assert_array_equal(written, pixels)


@pytest.mark.parametrize("suffix, depth", [(".jpg", 8), (".png", 8), (".png", 16), (".tif", 8), (".tif", 16)])
def test_grey_photos_stay_grey(tmp_path, suffix, depth):
    grey = np.asarray(PICTURE.convert("L"))
    path = tmp_path / f"a{suffix}"
    if depth == 16:
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(grey).save(path)
    with Image.open(again(path)) as image:
        assert image.mode == ("L" if depth == 8 else "I;16")
    photo = read_photo(path)
    photo.pixels[0, 0] = (0, 1, 0)
    write_photo(tmp_path / f"b{suffix}", photo)
    with Image.open(tmp_path / f"b{suffix}") as image:
        assert image.mode == "RGB"
