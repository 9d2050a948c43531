"""Machines on slow links, played by network namespaces of one Linux machine (needs root).

from benchmarks.emulated_links.star import star
with star(peers=4, mbit=10, delay_ms=40, loss=0.0) as net:
    print(net.measured())
    net.run("hub", [...server...]); net.run(0, [...peer...])
"""
