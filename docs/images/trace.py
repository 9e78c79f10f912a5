#!/usr/bin/env python3
"""Draws a trace as it was exported: python3 trace.py PORT SECONDS FILE.svg

Takes spans by OTLP (gRPC) on 127.0.0.1:PORT for so many seconds, or until SIGTERM, and draws the
trace with the most of them. Needs `pip install grpcio opentelemetry-proto`.
"""

import collections
import html
import signal
import sys
import threading
from concurrent import futures

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

COLOURS = {"emberline": "#7a7f87", "emberline-coordinator": "#3567c5", "emberline-worker": "#c8701b"}
WIDTH, NAMES, ROW, TOP = 960, 150, 18, 66


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self):
        self.traces = collections.defaultdict(dict)

    def Export(self, request, context):
        for resource in request.resource_spans:
            of = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    # What is told twice is the same span.
                    told = (of["service.name"], of.get("service.instance.id", ""), span)
                    self.traces[span.trace_id][span.span_id] = told
        return trace_service_pb2.ExportTraceServiceResponse()


def rows(spans):
    """Rows in the order of a tree: depth, name, spans. What a task waited is in the row of the task; epochs, and
    what an attempt gets and puts, are one row each."""
    below = collections.defaultdict(list)
    for told in sorted(spans.values(), key=lambda t: (t[2].start_time_unix_nano, t[2].name)):
        parent = told[2].parent_span_id
        below[parent if parent in spans else b""].append(told)

    def walk(parent, depth):
        many, waits = collections.defaultdict(list), collections.defaultdict(list)
        for told in below[parent]:
            kind, _, of = told[2].name.partition(" ")
            if kind == "queue":
                waits[of].append(told)
            elif kind in ("get", "put", "epoch"):
                many[kind].append(told)
        for kind, told in many.items():
            yield depth, f"{len(told)} × {kind}" if len(told) > 1 else told[0][2].name, told
        for told in below[parent]:
            if told[2].name.partition(" ")[0] not in ("get", "put", "epoch", "queue"):
                yield depth, told[2].name, waits.pop(told[2].name, []) + [told]
                yield from walk(told[2].span_id, depth + 1)

    return list(walk(b"", 0))


def length(nanoseconds):
    return f"{nanoseconds / 1e9:.2f} s" if nanoseconds >= 1e9 else f"{nanoseconds / 1e6:.1f} ms"


def draw(spans, terms):
    lines = rows(spans)
    start = min(t[2].start_time_unix_nano for t in spans.values())
    whole = max(t[2].end_time_unix_nano for t in spans.values()) - start
    scale = (WIDTH - NAMES - 70) / whole
    height = TOP + ROW * len(lines) + 26
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fff" stroke="#d6dae0"/>',
    ]

    def text(x, y, what, more=""):
        out.append(f'<text x="{x:.1f}" y="{y}" fill="#24292f"{more}>{html.escape(what)}</text>')

    root = lines[0][2][0][2]
    trace = root.trace_id.hex()
    text(16, 24, f"{root.name}, {len(spans)} spans in {length(whole)}", ' font-size="14" font-weight="600"')
    text(16, 41, f"trace {trace}", ' fill-opacity="0.6"')
    x = 560
    for service, colour in COLOURS.items():
        if any(t[0] == service for t in spans.values()):
            out.append(f'<rect x="{x}" y="15" width="10" height="10" rx="2" fill="{colour}"/>')
            text(x + 15, 24, service)
            x += 165
    for i in range(5):
        x = NAMES + scale * whole * i / 4
        out.append(f'<path d="M{x:.1f} {TOP - 4}V{height - 24}" stroke="#eceff3"/>')
        text(x, TOP - 8, length(whole * i / 4), ' fill-opacity="0.6" text-anchor="middle"')
    for begin, who in terms:
        if start < begin < start + whole:
            x = NAMES + scale * (begin - start)
            out.append(f'<path d="M{x:.1f} {TOP - 2}V{height - 22}" stroke="#c03434" stroke-dasharray="4 3"/>')
            text(x + 5, height - 14, f"the leader was killed; {who} leads from here", ' font-size="10"')
    for at, (depth, name, told) in enumerate(lines):
        y = TOP + ROW * at
        text(16 + 12 * depth, y + 12, name)
        for service, _, span in told:
            x = NAMES + scale * (span.start_time_unix_nano - start)
            width = max(scale * (span.end_time_unix_nano - span.start_time_unix_nano), 1.5)
            gap = 0.8 if len(told) > 1 else 0
            colour = "#c03434" if span.status.code == 2 else COLOURS.get(service, "#555")
            opacity = 0.35 if span.name.startswith("queue ") else 1
            out.append(
                f'<rect x="{x:.1f}" y="{y + 3}" width="{max(width - gap, 0.7):.1f}" height="12" rx="2" '
                f'fill="{colour}" fill-opacity="{opacity}"/>'
            )
        timed = [span for _, _, span in told if not span.name.startswith("queue ")]
        first, last = timed[0], timed[-1]
        end = NAMES + scale * (last.end_time_unix_nano - start)
        text(end + 5, y + 13, length(last.end_time_unix_nano - first.start_time_unix_nano), ' fill-opacity="0.6" font-size="10"')
    out.append("</svg>")
    return "\n".join(out) + "\n"


def main():
    port, seconds, file = sys.argv[1:]
    receiver, stop = Receiver(), threading.Event()
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 1 << 26)])
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    if not server.add_insecure_port(f"127.0.0.1:{port}"):
        sys.exit(f"error: port {port} is taken")
    server.start()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait(float(seconds))
    server.stop(1).wait()
    if not receiver.traces:
        sys.exit("error: no spans came")
    with open(file, "w", encoding="utf-8") as to:
        whole = max(receiver.traces.values(), key=len)
        led = [t for spans in receiver.traces.values() for t in spans.values() if t[2].name == "lead"]
        to.write(draw(whole, [(span.start_time_unix_nano, who) for _, who, span in led]))


main()
