"""Metadata for the picture files of tests."""

import PIL.Image
import PIL.ImageCms

PROFILE = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" dc:source="a pond"/>'
    b"</rdf:RDF></x:xmpmeta>"
)


def exif(orientation=1):
    made = PIL.Image.Exif()
    made[0x0112], made[0x010F], made[0x011A], made[0x011B], made[0x0128] = orientation, "a camera", 72, 72, 2
    inner = made.get_ifd(0x8769)
    inner[0xA002], inner[0xA003], inner[0x927C], inner[0x9286] = 12, 8, b"maker\0note", b"UNICODE\0a\0"
    made.get_ifd(0x8825)[2] = (51.0, 30.0, 26.0)
    return made.tobytes()
