"""RNN, GRU and LSTM as TensorRT loops: the input products for all steps at once, the recurrence one step at a time."""

import torch

from . import layers as L
from .errors import UncoveredOperation
from .table import converter


def _scan(net, sequence, states, step, reverse):
    """sequence (T, B, G) -> outputs (T, B, H), last states; step(slice, states) -> (output, states)."""
    trt, network = net.trt, net.network
    count = L.reshape(L.cast(net.size(sequence.shape[0]), torch.int32), ())
    loop = network.add_loop()
    loop.name = f"{net.operation}.{network.num_layers}"
    net.named(loop.add_trip_limit(count.tensor, trt.TripLimit.COUNT), "trip_limit")
    iterator = net.named(loop.add_iterator(sequence.tensor, 0, reverse), "iterator")
    here = net.output(iterator, sequence.shape[1:])
    recurrences = [net.named(loop.add_recurrence(s.tensor), "recurrence") for s in states]
    inside = [net.output(r, s.shape) for r, s in zip(recurrences, states, strict=True)]
    output, new_states = step(here, inside)
    for recurrence, new in zip(recurrences, new_states, strict=True):
        recurrence.set_input(1, new.tensor)
    order = trt.LoopOutput.REVERSE if reverse else trt.LoopOutput.CONCATENATE
    collected = net.named(loop.add_loop_output(output.tensor, order, 0), "loop_output")
    collected.set_input(1, count.tensor)
    outputs = net.output(collected, (sequence.shape[0], *output.shape))
    last = [
        net.output(net.named(loop.add_loop_output(r.tensor, trt.LoopOutput.LAST_VALUE, 0), "last_value"), r.shape)
        for r in inside
    ]
    return outputs, last


def _chunks(node, count):
    size = node.shape[-1] // count
    whole = list(node.shape)
    return [
        L.slice_(node, [0] * (node.rank - 1) + [i * size], [*whole[:-1], size], [1] * node.rank) for i in range(count)
    ]


def _sigmoid(node):
    return L.activation("SIGMOID", node)


def _tanh(node):
    return L.activation("TANH", node)


def _lstm_step(recur, project):
    def step(x, states):
        hidden, cell = states
        i, f, g, o = _chunks(x + recur(hidden), 4)
        cell = _sigmoid(f) * cell + _sigmoid(i) * _tanh(g)
        hidden = project(_sigmoid(o) * _tanh(cell))
        return hidden, [hidden, cell]

    return step


def _gru_step(recur, project):
    def step(x, states):
        (hidden,) = states
        xr, xz, xn = _chunks(x, 3)
        hr, hz, hn = _chunks(recur(hidden), 3)
        reset, update = _sigmoid(xr + hr), _sigmoid(xz + hz)
        new = _tanh(xn + reset * hn)
        hidden = new + update * (hidden - new)
        return hidden, [hidden]

    return step


def _rnn_step(activation):
    def make(recur, project):
        def step(x, states):
            hidden = L.activation(activation, x + recur(states[0]))
            return hidden, [hidden]

        return step

    return make


def _linear(net, node, weight, bias):
    out = L.matmul(node, net.operand(weight), transpose_b=True)
    return out if bias is None else out + net.operand(bias)


def _recurrent(net, make_step, x, initial, parameters, has_biases, num_layers, bidirectional, batch_first):
    """x (T, B, I) or (B, T, I); initial: list of (layers * directions, B, H) -> output, last states stacked."""
    directions = 2 if bidirectional else 1
    per = len(parameters) // (num_layers * directions)
    projected = per > (4 if has_biases else 2)
    node = net.operand(x)
    if batch_first:
        node = L.transpose(node, [1, 0, 2])
    initial = [net.operand(s) for s in initial]
    lasts = [[] for _ in initial]
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            at = layer * directions + direction
            w_ih, w_hh, *biases = parameters[at * per : (at + 1) * per]
            w_hr = biases.pop() if projected else None
            b_ih, b_hh = biases if has_biases else (None, None)
            states = []
            for s in initial:
                piece = L.slice_(s, [at, 0, 0], [1, *s.shape[1:]], [1, 1, 1])
                states.append(L.reshape(piece, s.shape[1:]))
            sequence = _linear(net, node, w_ih, b_ih)

            def recur(hidden, w_hh=w_hh, b_hh=b_hh):
                return _linear(net, hidden, w_hh, b_hh)

            def project(hidden, w_hr=w_hr):
                return hidden if w_hr is None else _linear(net, hidden, w_hr, None)

            out, last = _scan(net, sequence, states, make_step(recur, project), direction == 1)
            outputs.append(out)
            for kept, state in zip(lasts, last, strict=True):
                kept.append(L.reshape(state, (1, *state.shape)))
        node = L.concat(outputs, -1)
    output = L.transpose(node, [1, 0, 2]) if batch_first else node
    return tuple(net.tensor(node, x.dtype) for node in (output, *(L.concat(kept, 0) for kept in lasts)))


def _refuse(net, arguments, dropout, train):
    if train and dropout:
        raise UncoveredOperation(f"{net.where()}recurrent dropout in training mode; call module.eval() before building")
    if not isinstance(arguments[3], bool):
        raise UncoveredOperation(f"{net.where()}packed sequences have as many rows as the data says; pass padded ones")


@converter(torch.lstm, torch._VF.lstm, kind="float32")
def lstm(net, x, hx, parameters, has_biases, num_layers, dropout, train, bidirectional, *batch_first):
    _refuse(net, (x, hx, parameters, has_biases), dropout, train)
    return _recurrent(net, _lstm_step, x, hx, parameters, has_biases, num_layers, bidirectional, *batch_first)


def _single_state(step):
    def convert(net, x, hx, parameters, has_biases, num_layers, dropout, train, bidirectional, *batch_first):
        _refuse(net, (x, hx, parameters, has_biases), dropout, train)
        return _recurrent(net, step, x, [hx], parameters, has_biases, num_layers, bidirectional, *batch_first)

    return convert


converter(torch.gru, torch._VF.gru, kind="float32")(_single_state(_gru_step))
converter(torch.rnn_tanh, torch._VF.rnn_tanh, kind="float32")(_single_state(_rnn_step("TANH")))
converter(torch.rnn_relu, torch._VF.rnn_relu, kind="float32")(_single_state(_rnn_step("RELU")))


@converter(torch.lstm_cell, torch._VF.lstm_cell)
def lstm_cell(net, x, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    gates = torch.nn.functional.linear(x, w_ih, b_ih) + torch.nn.functional.linear(hx[0], w_hh, b_hh)
    i, f, g, o = gates.chunk(4, -1)
    cell = torch.sigmoid(f) * hx[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


@converter(torch.gru_cell, torch._VF.gru_cell)
def gru_cell(net, x, hidden, w_ih, w_hh, b_ih=None, b_hh=None):
    xr, xz, xn = torch.nn.functional.linear(x, w_ih, b_ih).chunk(3, -1)
    hr, hz, hn = torch.nn.functional.linear(hidden, w_hh, b_hh).chunk(3, -1)
    new = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return new + torch.sigmoid(xz + hz) * (hidden - new)
