defmodule Bridge.Store.Snapshot do
  @moduledoc false
  # What a store's directory holds, as one image: the newest snapshot and the logs from its number on. And the next
  # snapshot, made of the files alone.

  alias Bridge.Error
  alias Bridge.Store.{Files, Log, Tables}

  @own ~w(owner secrets.key secrets.key.new)
  @facts_a_frame 200

  @type found :: %{
          generation: pos_integer(),
          cut: :new | nil | non_neg_integer(),
          snapshot_bytes: non_neg_integer(),
          leftovers: [Path.t()]
        }

  @spec log_path(Path.t(), pos_integer()) :: Path.t()
  def log_path(directory, generation), do: Path.join(directory, "log.#{generation}")

  @spec snapshot_path(Path.t(), pos_integer()) :: Path.t()
  def snapshot_path(directory, generation), do: Path.join(directory, "snapshot.#{generation}")

  @doc "Makes the image what the directory holds. Changes no file. `cut`: where the newest log's sound part ends."
  @spec recover(Path.t(), Tables.t()) :: {:ok, found()} | {:error, Error.t()}
  def recover(directory, tables) do
    with {:ok, files} <- listed(directory),
         {:ok, plan} <- plan(directory, files),
         :ok <- load_snapshot(directory, plan.snapshot, tables),
         {:ok, cut} <- load_logs(directory, plan.logs, tables) do
      bytes = if plan.snapshot, do: File.stat!(snapshot_path(directory, plan.snapshot)).size, else: 0
      generation = List.last(plan.logs) || 1
      {:ok, %{generation: generation, cut: cut, snapshot_bytes: bytes, leftovers: plan.leftovers}}
    end
  end

  defp listed(directory) do
    with {:error, reason} <- File.ls(directory) do
      Error.error(:store_failed, "the store #{directory} cannot be read: #{:file.format_error(reason)}")
    end
  end

  defp plan(directory, files) do
    numbered = for file <- files, found = number(file), do: found
    snapshots = for {:snapshot, n} <- numbered, do: n
    snapshot = Enum.max(snapshots, fn -> nil end)
    first = snapshot || 1
    logs = Enum.sort(for {:log, n} <- numbered, n >= first, do: n)
    # A draft that was never renamed, and what the newest snapshot has made of no use.
    old = for {kind, n} <- numbered, n < first, do: Path.join(directory, "#{kind}.#{n}")

    drafts =
      for "." <> _ = file <- files,
          file =~ ~r/\A\.(log|snapshot|owner).*\.[0-9a-f]{16}\z/,
          do: Path.join(directory, file)

    strange =
      for file <- files, number(file) == nil, file not in @own, not String.starts_with?(file, [".", "owner."]), do: file

    cond do
      numbered == [] and strange != [] ->
        Error.error(:store_damaged, "#{directory} is no store: it holds #{strange |> Enum.take(3) |> Enum.join(", ")}",
          remedy: "Give the store a directory of its own. Nothing was changed."
        )

      logs != Enum.to_list(first..(first + length(logs) - 1)//1) or (logs == [] and snapshot != nil) ->
        damaged(
          directory,
          "a log is missing: there is #{if logs == [], do: "none", else: Enum.map_join(logs, ", ", &"log.#{&1}")}"
        )

      true ->
        {:ok, %{snapshot: snapshot, logs: logs, leftovers: old ++ drafts}}
    end
  end

  defp number(file) do
    case Regex.run(~r/\A(log|snapshot)\.([1-9][0-9]{0,17})\z/, file) do
      [_all, "log", n] -> {:log, String.to_integer(n)}
      [_all, "snapshot", n] -> {:snapshot, String.to_integer(n)}
      nil -> nil
    end
  end

  defp load_snapshot(_directory, nil, _tables), do: :ok

  defp load_snapshot(directory, generation, tables) do
    path = snapshot_path(directory, generation)

    load = fn
      :complete, _state -> :complete
      facts, :reading -> Tables.apply(tables, facts) && :reading
    end

    case Log.fold(path, :snapshot, generation, :reading, load) do
      {:ok, :complete, :whole} -> :ok
      # It had its name when all of it was on disk.
      {:ok, _state, _torn} -> damaged(path, "its end is missing")
      {:error, reason} -> damaged(path, reason)
    end
  end

  defp load_logs(_directory, [], _tables), do: {:ok, :new}

  defp load_logs(directory, [generation | later], tables) do
    path = log_path(directory, generation)
    load = fn facts, :ok -> Tables.apply(tables, facts) end

    case {Log.fold(path, :log, generation, :ok, load), later} do
      {{:ok, :ok, :whole}, []} -> {:ok, nil}
      {{:ok, :ok, {:torn, at}}, []} -> {:ok, at}
      {{:ok, :ok, :whole}, later} -> load_logs(directory, later, tables)
      # The next was begun when all of this one was on disk.
      {{:ok, :ok, {:torn, at}}, _later} -> damaged(path, "it is damaged at byte #{at}")
      {{:error, reason}, _later} -> damaged(path, reason)
    end
  end

  defp damaged(path, reason), do: Error.error(:store_damaged, "the store cannot be read: #{path}: #{reason}")

  @doc "Makes the snapshot of that number, and removes what it replaces; its size. Raises if it cannot."
  @spec make!(Path.t(), pos_integer(), pos_integer()) :: pos_integer()
  def make!(directory, generation, versions) do
    tables = Tables.new(versions: versions)
    {:ok, files} = File.ls(directory)
    files = Enum.reject(files, &(&1 in ["log.#{generation}"]))
    {:ok, plan} = plan(directory, files)
    :ok = load_snapshot(directory, plan.snapshot, tables)
    {:ok, nil} = load_logs(directory, plan.logs, tables)

    path = snapshot_path(directory, generation)
    :ok = write(path, generation, tables)
    Tables.delete(tables)
    for log <- plan.logs, do: File.rm!(log_path(directory, log))
    if plan.snapshot, do: File.rm!(snapshot_path(directory, plan.snapshot))
    File.stat!(path).size
  end

  defp write(path, generation, tables) do
    frames =
      tables
      |> Tables.facts()
      |> Stream.chunk_every(@facts_a_frame)
      |> Stream.concat([:complete])
      |> Stream.map(&Log.frame(&1, 0))

    Files.stream(path, Stream.concat([Log.header(:snapshot, generation)], frames))
  end
end
