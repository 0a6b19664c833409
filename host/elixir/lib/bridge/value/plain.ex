defmodule Bridge.Value.Plain do
  # The JSON that a value is judged as by a schema. Not the wire form: it does not lead back to the value.
  @moduledoc false

  alias Bridge.{Bytes, Frozenset, NpScalar, Record}
  alias Bridge.Value.{Fault, Implementation, Text}

  @max_depth 100

  @doc "The JSON; or where there is none, and why."
  @spec of(term()) :: {:ok, term()} | {:error, String.t(), String.t()}
  def of(value) do
    {:ok, plain(value, [], @max_depth)}
  catch
    {__MODULE__, path, reason} ->
      {:error, path |> Enum.reverse() |> Enum.take(20) |> Enum.map_join(&Fault.key_step/1), reason}
  end

  defp plain(value, path, depth) when depth < 0, do: no(value, path, "is nested too deeply")
  defp plain(value, _path, _depth) when is_binary(value) or is_number(value) or value in [nil, true, false], do: value
  # For no type to take.
  defp plain(value, _path, _depth) when value in [:nan, :infinity, :neg_infinity], do: value

  defp plain(value, path, depth) when is_list(value) do
    if List.improper?(value), do: no(value, path, "has no JSON form")
    list(value, path, depth)
  end

  defp plain(%Record{kind: :namedtuple, fields: fields}, path, depth), do: list(Map.values(fields), path, depth)

  defp plain(%Record{kind: :enum, class: class} = value, path, _depth) do
    no(value, path, "holds a member of #{class}, whose class is not loaded here")
  end

  defp plain(%Record{fields: fields}, path, depth), do: plain(fields, path, depth)
  defp plain(%Bytes{data: data}, _path, _depth), do: Base.encode64(data)
  defp plain(%MapSet{} = set, path, depth), do: set |> MapSet.to_list() |> list(path, depth)
  defp plain(%Frozenset{items: set}, path, depth), do: plain(set, path, depth)
  defp plain(%Date{} = date, _path, _depth), do: Date.to_iso8601(date)
  defp plain(%Time{} = time, _path, _depth), do: Time.to_iso8601(time)
  defp plain(%NaiveDateTime{} = moment, _path, _depth), do: NaiveDateTime.to_iso8601(moment)
  defp plain(%DateTime{} = moment, _path, _depth), do: DateTime.to_iso8601(moment)
  defp plain(%Bridge.Decimal{value: text}, _path, _depth), do: text
  defp plain(%Bridge.UUID{value: text}, _path, _depth), do: text
  defp plain(%{__struct__: Decimal} = package, _path, _depth), do: Bridge.Decimal.of_package(package).value

  defp plain(%NpScalar{} = scalar, path, _depth) do
    case NpScalar.value(scalar) do
      {:ok, value} -> value
      :error -> no(scalar, path, "has no JSON form")
    end
  end

  defp plain(value, path, depth) when is_struct(value) do
    case Implementation.of(value) do
      nil -> no(value, path, "has no JSON form")
      implementation -> plain(implementation.to_value(value), path, depth - 1)
    end
  end

  defp plain(value, path, depth) when is_map(value) do
    Map.new(value, fn {key, item} ->
      name = name(key, path)
      {name, plain(item, [name | path], depth - 1)}
    end)
  end

  defp plain({{type, _bits}, shape, _data} = array, path, _depth) when is_atom(type) and is_tuple(shape) do
    no(array, path, "has no JSON form")
  end

  defp plain(value, path, depth) when is_tuple(value), do: value |> Tuple.to_list() |> list(path, depth)
  defp plain(value, path, _depth), do: no(value, path, "has no JSON form")

  defp list(items, path, depth) do
    items |> Enum.with_index() |> Enum.map(fn {item, index} -> plain(item, [index | path], depth - 1) end)
  end

  # As pydantic writes the keys of a dict.
  defp name(key, _path) when is_binary(key), do: key
  defp name(key, _path) when is_integer(key), do: Integer.to_string(key)
  defp name(nil, _path), do: "None"
  defp name(key, _path) when is_atom(key), do: Atom.to_string(key)
  defp name(key, path), do: no(key, path, "has a key that has no JSON form")

  @spec no(term(), list(), String.t()) :: no_return()
  defp no(%_{} = value, path, "has no JSON form"),
    do: throw({__MODULE__, path, "is or holds a #{Text.kind(value)}, which has no JSON form"})

  defp no(_value, path, reason), do: throw({__MODULE__, path, reason})
end
