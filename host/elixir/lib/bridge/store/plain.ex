defmodule Bridge.Store.Plain do
  @moduledoc false
  # Terms as the store keeps them: what a name is, what a term is called, and the term that a reader on either side of
  # the bridge would find in place of one that was given.

  alias Bridge.Error

  @doc "A name that every host and kernel can write."
  @spec check_name(String.t(), term()) :: :ok | {:error, Error.t()}
  def check_name(kind, name) do
    cond do
      not is_binary(name) ->
        Error.error(
          :invalid_params,
          "the name of a #{kind} is a string, not #{inspect(name, limit: 5, printable_limit: 60)}"
        )

      name == "" ->
        Error.error(:invalid_params, "the name of a #{kind} is a string that is not empty")

      not String.valid?(name) ->
        Error.error(
          :invalid_params,
          "the name of a #{kind} is text in UTF-8, not #{inspect(name, printable_limit: 60)}"
        )

      true ->
        :ok
    end
  end

  @doc """
  The term that is kept of a value that somebody gives: itself, if it is plain data; else what it reads as when it has
  crossed the bridge, so that here and there the same is read. `:not_serializable` if it cannot cross it.
  """
  @spec normal(term(), String.t(), (struct() -> term())) :: {:ok, term()} | {:error, Error.t()}
  def normal(term, path, hook) do
    if plain?(term) do
      {:ok, term}
    else
      with {:ok, json, buffers} <- Bridge.Value.encode(term, path) do
        Bridge.Value.decode(json, buffers, path: path, hook: hook)
      end
    end
  end

  @doc "What a reference read in that session becomes: it says whose it is."
  @spec hook(atom(), String.t()) :: (struct() -> struct())
  def hook(bridge, session) do
    fn
      %Bridge.Ref{} = ref -> %{ref | bridge: bridge, session: session}
      tag -> tag
    end
  end

  @doc "The same with strings for keys and values that were atoms: a JSON Schema as people write it."
  @spec stringify(term()) :: term()
  def stringify(%{} = map) when not is_struct(map) do
    Map.new(map, fn {key, value} -> {if(is_atom(key), do: Atom.to_string(key), else: key), stringify(value)} end)
  end

  def stringify(list) when is_list(list), do: Enum.map(list, &stringify/1)
  def stringify(atom) when is_atom(atom) and atom not in [nil, true, false], do: Atom.to_string(atom)
  def stringify(term), do: term

  # Whether it reads the same wherever it goes, without a look at its encoding.
  defp plain?(term) when is_number(term) or is_boolean(term) or is_nil(term), do: true
  defp plain?(term) when is_binary(term), do: String.valid?(term)
  defp plain?(term) when is_list(term), do: plain_list?(term)

  defp plain?(term) when is_map(term) and not is_struct(term) do
    Enum.all?(term, fn {key, value} -> is_binary(key) and String.valid?(key) and plain?(value) end)
  end

  defp plain?(_term), do: false

  defp plain_list?([head | tail]), do: plain?(head) and plain_list?(tail)
  defp plain_list?([]), do: true
  defp plain_list?(_improper), do: false

  @doc "What a term is called, in Python's words: those of the kernels, and of the other host's exports."
  @spec type_name(term()) :: String.t()
  def type_name(nil), do: "NoneType"
  def type_name(term) when is_boolean(term), do: "bool"
  def type_name(term) when is_integer(term), do: "int"
  def type_name(term) when is_float(term) or term in [:nan, :infinity, :neg_infinity], do: "float"
  def type_name(term) when is_binary(term), do: "str"
  def type_name(term) when is_list(term), do: "list"

  def type_name({{_kind, bits}, shape, data}) when is_integer(bits) and is_tuple(shape) and is_binary(data),
    do: "ndarray"

  def type_name(term) when is_tuple(term), do: "tuple"
  def type_name(%{__struct__: struct} = term), do: struct_name(struct, term)
  def type_name(term) when is_map(term), do: "dict"
  def type_name(_term), do: "object"

  @names %{
    MapSet => "set",
    Date => "date",
    Time => "time",
    NaiveDateTime => "datetime",
    DateTime => "datetime",
    Decimal => "Decimal",
    Bridge.NDArray => "ndarray",
    Bridge.Complex => "complex",
    Bridge.Frozenset => "frozenset",
    Bridge.Timedelta => "timedelta",
    Bridge.UUID => "UUID",
    Bridge.Zoned => "datetime",
    Bridge.Ref => "Instance",
    Bridge.Tool => "Tool",
    Bridge.Variable => "Variable"
  }

  defp struct_name(Bridge.Bytes, %{mutable: true}), do: "bytearray"
  defp struct_name(Bridge.Bytes, _term), do: "bytes"

  defp struct_name(_struct, %{class: class}) when is_binary(class) and class != "" do
    class |> String.split(".") |> List.last()
  end

  defp struct_name(Bridge.NpScalar, %{dtype: dtype}) when is_binary(dtype), do: dtype
  defp struct_name(struct, _term), do: Map.get_lazy(@names, struct, fn -> struct |> Module.split() |> List.last() end)
end
