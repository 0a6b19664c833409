defmodule Bridge.Store.Atoms do
  @moduledoc false
  # Reads terms of files, and lets them make only so many atoms: what fills the table of atoms ends the BEAM. An atom that
  # is not known yet is one of this host's code, which is not loaded; so there may be some. They are counted before any
  # is made.

  @most 10_000

  @opaque budget :: :counters.counters_ref()

  @doc "How many atoms may be made by all that is read with it."
  @spec budget() :: budget()
  def budget do
    budget = :counters.new(1, [])
    :counters.put(budget, 1, @most)
    budget
  end

  @doc "A term of the external format; `:error` if it is none, or makes more atoms than are left."
  @spec decode(binary(), budget()) :: {:ok, term()} | :error
  # A compressed term, which Bridge never writes, may be a thousand times larger than it looks.
  def decode(<<131, 80, _compressed::binary>>, _budget), do: :error

  def decode(payload, budget) do
    with :error <- to_term(payload, [:safe]),
         {:ok, new} <- unknown(payload),
         :ok <- :counters.sub(budget, 1, MapSet.size(new)),
         true <- :counters.get(budget, 1) >= 0 || :error,
         do: to_term(payload, [])
  end

  defp to_term(payload, opts) do
    {:ok, :erlang.binary_to_term(payload, opts)}
  rescue
    ArgumentError -> :error
  end

  defp unknown(<<131, terms::binary>>), do: walk(terms, 1, MapSet.new())
  defp unknown(_payload), do: :error

  # In the external format what a term holds follows it: `left` terms are to come.
  defp walk(_rest, 0, new), do: {:ok, new}

  defp walk(<<tag, size::16, name::binary-size(size), rest::binary>>, left, new) when tag in [100, 118],
    do: atom(name, tag, rest, left, new)

  defp walk(<<tag, size, name::binary-size(size), rest::binary>>, left, new) when tag in [115, 119],
    do: atom(name, tag, rest, left, new)

  # Integers, floats, nil
  defp walk(<<97, _, rest::binary>>, left, new), do: walk(rest, left - 1, new)
  defp walk(<<98, _::32, rest::binary>>, left, new), do: walk(rest, left - 1, new)
  defp walk(<<110, n, _, _::binary-size(n), rest::binary>>, left, new), do: walk(rest, left - 1, new)
  defp walk(<<111, n::32, _, _::binary-size(n), rest::binary>>, left, new), do: walk(rest, left - 1, new)
  defp walk(<<70, _::64, rest::binary>>, left, new), do: walk(rest, left - 1, new)
  defp walk(<<106, rest::binary>>, left, new), do: walk(rest, left - 1, new)
  # Strings, binaries, bitstrings
  defp walk(<<107, n::16, _::binary-size(n), rest::binary>>, left, new), do: walk(rest, left - 1, new)
  defp walk(<<109, n::32, _::binary-size(n), rest::binary>>, left, new), do: walk(rest, left - 1, new)
  defp walk(<<77, n::32, _, _::binary-size(n), rest::binary>>, left, new), do: walk(rest, left - 1, new)
  # Tuples, lists, maps
  defp walk(<<104, n, rest::binary>>, left, new), do: walk(rest, left - 1 + n, new)
  defp walk(<<105, n::32, rest::binary>>, left, new), do: walk(rest, left - 1 + n, new)
  defp walk(<<108, n::32, rest::binary>>, left, new), do: walk(rest, left + n, new)
  defp walk(<<116, n::32, rest::binary>>, left, new), do: walk(rest, left - 1 + 2 * n, new)
  # Processes, ports, references, functions: a struct of somebody's own may hold them.
  defp walk(<<88, rest::binary>>, left, new), do: at_node(rest, 12, left, new)
  defp walk(<<89, rest::binary>>, left, new), do: at_node(rest, 8, left, new)
  defp walk(<<120, rest::binary>>, left, new), do: at_node(rest, 12, left, new)
  defp walk(<<90, n::16, rest::binary>>, left, new), do: at_node(rest, 4 + 4 * n, left, new)
  defp walk(<<113, rest::binary>>, left, new), do: walk(rest, left + 2, new)

  defp walk(<<112, _size::32, _arity, _unique::128, _index::32, free::32, rest::binary>>, left, new),
    do: walk(rest, left + 3 + free, new)

  defp walk(_other, _left, _new), do: :error

  # The node's name, and so many bytes.
  defp at_node(<<tag, n::16, name::binary-size(n), rest::binary>>, bytes, left, new) when tag in [100, 118],
    do: at_node(name, tag, rest, bytes, left, new)

  defp at_node(<<tag, n, name::binary-size(n), rest::binary>>, bytes, left, new) when tag in [115, 119],
    do: at_node(name, tag, rest, bytes, left, new)

  defp at_node(_malformed, _bytes, _left, _new), do: :error

  defp at_node(name, tag, rest, bytes, left, new) do
    case rest do
      <<_::binary-size(bytes), rest::binary>> -> atom(name, tag, rest, left, new)
      _malformed -> :error
    end
  end

  defp atom(name, tag, rest, left, new) do
    new = if known?(name, if(tag in [100, 115], do: :latin1, else: :utf8)), do: new, else: MapSet.put(new, {tag, name})
    if MapSet.size(new) > @most, do: :error, else: walk(rest, left - 1, new)
  end

  defp known?(name, encoding) do
    _ = :erlang.binary_to_existing_atom(name, encoding)
    true
  rescue
    # Too long a name is none that is known.
    _error in [ArgumentError, SystemLimitError] -> false
  end
end
