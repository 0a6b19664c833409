defmodule Bridge.Schema.Pointer do
  # Where a reference leads: a JSON pointer into the schema, or an anchor.
  @moduledoc false

  @spec find(map() | boolean(), String.t()) :: {:ok, map() | boolean()} | :error
  def find(root, "#"), do: {:ok, root}

  def find(root, "#/" <> pointer) do
    pointer |> String.split("/") |> Enum.map(&unescaped/1) |> Enum.reduce_while({:ok, root}, &step/2) |> schema()
  end

  def find(root, "#" <> name), do: anchor(root, name)

  defp step(name, {:ok, part}) when is_map(part) and is_map_key(part, name), do: {:cont, {:ok, Map.fetch!(part, name)}}

  defp step(name, {:ok, part}) when is_list(part) do
    with {index, ""} when index >= 0 <- Integer.parse(name),
         {:ok, found} <- Enum.fetch(part, index) do
      {:cont, {:ok, found}}
    else
      _ -> {:halt, :error}
    end
  end

  defp step(_name, _found), do: {:halt, :error}

  defp schema({:ok, found}) when is_map(found) or is_boolean(found), do: {:ok, found}
  defp schema(_found), do: :error

  defp unescaped(name) do
    name = if name =~ ~r/%(?![0-9A-Fa-f]{2})/, do: name, else: URI.decode(name)
    name |> String.replace("~1", "/") |> String.replace("~0", "~")
  end

  defp anchor(%{"$anchor" => name} = schema, name), do: {:ok, schema}
  defp anchor(part, name) when is_map(part), do: part |> Map.values() |> anchor(name)

  defp anchor(parts, name) when is_list(parts),
    do: Enum.find_value(parts, :error, &with(:error <- anchor(&1, name), do: nil))

  defp anchor(_part, _name), do: :error
end
