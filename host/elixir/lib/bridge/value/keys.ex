defmodule Bridge.Value.Keys do
  # What may be in a set or be the key of a map: what Python can hash, and no two that are equal to it.
  @moduledoc false

  alias Bridge.{Bytes, Complex, Frozenset, NDArray, Record, Table, Tool}
  alias Bridge.Value.Text

  @max_same_hash 64
  # Python's hash of a number is the number modulo this prime: no secret, so a peer could choose many with one hash.
  @hash_prime 0x1FFF_FFFF_FFFF_FFFF

  @doc "Whether they can be; the reason, and what to do, if not."
  @spec check([term()]) :: :ok | {:unhashable, non_neg_integer(), String.t()} | :equal | :same_hash
  def check(items) do
    keys = items |> Enum.with_index() |> Enum.map(fn {item, index} -> key(item, index) end)

    cond do
      MapSet.size(MapSet.new(keys)) != length(keys) -> :equal
      length(keys) > @max_same_hash and same_hash?(keys) -> :same_hash
      true -> :ok
    end
  catch
    {__MODULE__, index, kind} -> {:unhashable, index, kind}
  end

  defp same_hash?(keys) do
    keys |> Enum.frequencies_by(&hash/1) |> Enum.any?(fn {_hash, count} -> count > @max_same_hash end)
  end

  defp hash(key) when is_integer(key), do: rem(key, @hash_prime)
  defp hash(key) when is_tuple(key), do: key |> Tuple.to_list() |> Enum.map(&hash/1)
  defp hash(key), do: key

  # Equal terms for what is equal in Python: 1, 1.0 and True are.
  defp key(true, _index), do: 1
  defp key(false, _index), do: 0
  defp key(number, _index) when is_float(number), do: if(trunc(number) == number, do: trunc(number), else: number)

  defp key({{type, bits}, shape, _} = array, i) when is_atom(type) and is_integer(bits) and is_tuple(shape),
    do: no(array, i)

  defp key(tuple, index) when is_tuple(tuple),
    do: tuple |> Tuple.to_list() |> Enum.map(&key(&1, index)) |> List.to_tuple()

  defp key(%Complex{real: real, imag: imag}, index) when imag == 0, do: key(real, index)
  defp key(%Frozenset{items: %MapSet{} = items}, index), do: {:frozenset, MapSet.new(items, &key(&1, index))}
  defp key(%Bytes{mutable: true} = bytes, index), do: no(bytes, index)
  defp key(%Tool{schema: %{}} = tool, index), do: no(tool, index)
  defp key(%Record{} = record, _index), do: record
  defp key(%module{} = unhashable, index) when module in [MapSet, NDArray, Table], do: no(unhashable, index)
  defp key(struct, _index) when is_struct(struct), do: struct
  defp key(container, index) when is_list(container) or is_map(container), do: no(container, index)
  defp key(other, _index), do: other

  defp no(term, index), do: throw({__MODULE__, index, Text.kind(term)})

  @doc "The words for what `check/1` found: what is wrong, and what to do."
  @spec words({:unhashable, non_neg_integer(), String.t()} | :equal | :same_hash) :: {String.t(), String.t()}
  def words({:unhashable, index, kind}) do
    {"element #{index}, a #{kind}, cannot be hashed by Python", "Use tuples for lists, Bridge.Frozenset for MapSet."}
  end

  def words(:equal), do: {"two of its elements are equal", "To Python 1, 1.0 and true are; here NaN equals itself."}

  def words(:same_hash) do
    {"more than #{@max_same_hash} of its elements have the same hash in Python", "Send a list of pairs."}
  end
end
