defmodule Bridge.Value.ArrowStream do
  # The frame of an Arrow IPC stream, checked before any library reads it: what may cost more than its own bytes is
  # refused. The layout is Arrow's: messages of a flatbuffer (Message.fbs, Schema.fbs) and a body.
  @moduledoc false

  alias Bridge.Value.Fault

  # Columns of nulls take no bytes, however many rows they claim: rows are counted against the bytes, eight a byte as in
  # a column of booleans, and this many are free.
  @max_hollow_rows 1_000_000
  @schema 1
  @dictionary 2
  @batch 3

  @doc "Throws the fault of a stream that is cut off, compressed, or claims more rows than it has bytes for."
  @spec check(binary(), Fault.path()) :: :ok
  def check(data, path), do: messages(data, 0, 0, @max_hollow_rows + 8 * byte_size(data), path)

  defp messages(<<>>, 0, _rows, _allowed, path), do: no_end(path)
  defp messages(<<>>, _count, _rows, _allowed, _path), do: :ok
  defp messages(<<0xFFFF_FFFF::32-little, 0::32>>, count, _rows, _allowed, _path) when count > 0, do: :ok
  defp messages(<<0xFFFF_FFFF::32-little, 0::32, _::binary>>, _count, _rows, _allowed, path), do: no_end(path)

  defp messages(<<0xFFFF_FFFF::32-little, size::32-signed-little, rest::binary>>, count, rows, allowed, path) do
    unless size > 0 and size <= byte_size(rest), do: cut_off(path)
    <<metadata::binary-size(size), rest::binary>> = rest
    message = table(metadata, u32(metadata, 0, path), path)
    body = number(message, 3, 64, path)
    unless body in 0..byte_size(rest), do: cut_off(path)
    <<_body::binary-size(body), rest::binary>> = rest
    kind = number(message, 1, 8, path)

    unless kind in [@schema, @dictionary, @batch] and kind == @schema == (count == 0) do
      Fault.malformed(path, "the Arrow stream's messages are not a schema, then batches")
    end

    rows = rows + if kind == @schema, do: 0, else: batch_rows(message, kind, body, path)

    if rows > allowed do
      Fault.too_much(path, "the Arrow table claims more rows than it has bytes for", "Leave out columns of nulls.")
    end

    messages(rest, count + 1, rows, allowed, path)
  end

  defp messages(<<0xFFFF_FFFF::32-little, _::binary>>, _count, _rows, _allowed, path), do: cut_off(path)
  defp messages(data, _count, _rows, _allowed, path) when byte_size(data) < 4, do: cut_off(path)
  defp messages(_data, _count, _rows, _allowed, path), do: Fault.malformed(path, "this is no Arrow IPC stream")

  # The most rows that any array of the batch claims.
  defp batch_rows(message, kind, body, path) do
    header = inner(message, 2, path)
    batch = if kind == @dictionary, do: inner(header, 1, path), else: header

    if field(batch, 3, path) do
      Fault.malformed(
        path,
        "the Arrow stream is compressed",
        "Send it uncompressed: a small body may hold a huge table."
      )
    end

    for {offset, length} <- pairs(batch, 2, path), not (offset >= 0 and length >= 0 and offset + length <= body) do
      Fault.malformed(path, "the Arrow stream has a buffer outside its body")
    end

    arrays = pairs(batch, 1, path)
    lengths = [number(batch, 0, 64, path) | Enum.map(arrays, &elem(&1, 0))]

    if Enum.any?(arrays, fn {length, nulls} -> nulls not in 0..length//1 end) or Enum.min(lengths) < 0 do
      Fault.malformed(path, "the Arrow stream has an array of impossible length")
    end

    Enum.max(lengths)
  end

  # A table of a flatbuffer: where it is, where its vtable is, and how long that is.
  defp table(data, at, path) do
    vtable = at - int(data, at, 32, path)
    {data, at, vtable, uint(data, vtable, 16, path)}
  end

  # Where the n-th field is, or nil.
  defp field({data, at, vtable, width}, n, path) do
    slot = 4 + 2 * n
    offset = if slot < width, do: uint(data, vtable + slot, 16, path), else: 0
    if offset != 0, do: at + offset
  end

  defp number({data, _, _, _} = table, n, bits, path) do
    case field(table, n, path) do
      nil -> 0
      at when bits == 8 -> uint(data, at, 8, path)
      at -> int(data, at, bits, path)
    end
  end

  defp inner({data, _, _, _} = table, n, path) do
    case field(table, n, path) do
      nil -> Fault.malformed(path, "the Arrow stream lacks a part of a message")
      at -> table(data, at + u32(data, at, path), path)
    end
  end

  # A vector of structs of two 64-bit integers.
  defp pairs({data, _, _, _} = table, n, path) do
    case field(table, n, path) do
      nil ->
        []

      at ->
        at = at + u32(data, at, path)
        length = u32(data, at, path)
        if length * 16 > byte_size(data) - at - 4, do: cut_off(path)

        for <<first::64-signed-little, second::64-signed-little <- binary_part(data, at + 4, 16 * length)>>,
          do: {first, second}
    end
  end

  defp u32(data, at, path), do: uint(data, at, 32, path)

  defp uint(data, at, bits, path) do
    size = div(bits, 8)
    data |> part(at, size, path) |> :binary.decode_unsigned(:little)
  end

  defp int(data, at, bits, path) do
    <<number::signed-little-size(bits)>> = part(data, at, div(bits, 8), path)
    number
  end

  defp part(_data, at, _size, path) when at < 0 do
    Fault.malformed(path, "the Arrow stream has an offset that points before its start")
  end

  defp part(data, at, size, path) do
    if at + size <= byte_size(data), do: binary_part(data, at, size), else: cut_off(path)
  end

  @spec cut_off(Fault.path()) :: no_return()
  defp cut_off(path), do: Fault.malformed(path, "the Arrow stream is cut off")

  @spec no_end(Fault.path()) :: no_return()
  defp no_end(path), do: Fault.malformed(path, "the Arrow stream does not end where its buffer does")
end
