defmodule Bridge.Value.DType do
  # NumPy's descriptions of an array's items, as in its file format: checked, and how many bytes an item has.
  @moduledoc false

  import Bridge.Value.Fault, only: [malformed: 2, too_much: 2]

  alias Bridge.Value.Fault

  @max_depth 16
  @max_rank 64
  @max_length 0x7FFF_FFFF_FFFF_FFFF
  @max_item 0x7FFF_FFFF
  @sizes %{
    ?b => [1],
    ?i => [1, 2, 4, 8],
    ?u => [1, 2, 4, 8],
    ?f => [2, 4, 8, 12, 16],
    ?c => [8, 16, 24, 32]
  }

  @doc "The bytes that one item takes."
  @spec item_size(term(), Fault.path()) :: non_neg_integer()
  def item_size(dtype, path) do
    size = size(dtype, @max_depth, path)
    if size <= @max_item, do: size, else: unknown(path)
  end

  defp size(_dtype, depth, path) when depth < 0 do
    too_much(path, ~s("dtype" has structs nested deeper than #{@max_depth}))
  end

  defp size(<<order, kind, rest::binary>>, _depth, path) when order in [?<, ?>, ?|] do
    cond do
      kind in [?m, ?M] ->
        if rest =~ ~r/\A8(?:\[[0-9]{0,9}(?:Y|M|W|D|h|m|s|ms|us|μs|ns|ps|fs|as)\])?\z/u, do: 8, else: unknown(path)

      not (rest =~ ~r/\A[0-9]{1,10}\z/) ->
        unknown(path)

      kind in [?S, ?V] ->
        String.to_integer(rest)

      kind == ?U ->
        4 * String.to_integer(rest)

      String.to_integer(rest) in Map.get(@sizes, kind, []) ->
        String.to_integer(rest)

      true ->
        unknown(path)
    end
  end

  defp size(fields, depth, path) when is_list(fields) do
    names = fields |> Enum.map(&field_name(&1, path)) |> Enum.reject(&(&1 == ""))
    if Enum.uniq(names) != names, do: unknown(path)

    fields
    |> Enum.map(fn
      [_name, inner] -> size(inner, depth - 1, path)
      [_name, inner, lengths] -> size(inner, depth - 1, path) * product(shape(lengths, path))
    end)
    |> Enum.sum()
  end

  defp size(_dtype, _depth, path), do: malformed(path, ~s("dtype" must be a description as in numpy's file format))

  defp field_name([name, _inner | shape], path) when length(shape) <= 1 do
    case name do
      name when is_binary(name) -> name
      [title, name] when is_binary(title) and is_binary(name) -> name
      _ -> malformed(path, ~s(a field of "dtype" must be named by a string, or by its title and name))
    end
  end

  defp field_name(_field, path), do: malformed(path, ~s("dtype" must be a description as in numpy's file format))

  @spec unknown(Fault.path()) :: no_return()
  defp unknown(path), do: malformed(path, ~s("dtype" is none that numpy knows))

  @doc "The lengths of a shape, checked."
  @spec shape(term(), Fault.path()) :: [non_neg_integer()]
  def shape(lengths, path) do
    cond do
      not is_list(lengths) or not Enum.all?(lengths, &(is_integer(&1) and &1 in 0..@max_length)) ->
        malformed(path, "a shape must be a list of 64-bit integers from 0")

      length(lengths) > @max_rank ->
        too_much(path, "an array has at most #{@max_rank} dimensions, not #{length(lengths)}")

      # As numpy: the lengths beside a 0 must have a product too.
      lengths |> Enum.reject(&(&1 == 0)) |> product() > @max_length ->
        malformed(path, "no array has this shape")

      true ->
        lengths
    end
  end

  @spec product([non_neg_integer()]) :: non_neg_integer()
  def product(lengths), do: Enum.reduce(lengths, 1, &*/2)
end
