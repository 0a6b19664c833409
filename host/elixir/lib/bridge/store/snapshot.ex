defmodule Bridge.Store.Snapshot do
  @moduledoc false
  # What a store's directory holds, as one image: the newest snapshot and the logs from its number on. And the next
  # snapshot, made of the files alone.

  alias Bridge.Error
  alias Bridge.Store.{Atoms, Files, Log, Tables}

  @own ~w(owner secrets.key)
  @facts_a_frame 200

  @type found :: %{
          generation: pos_integer(),
          cut: :new | nil | non_neg_integer(),
          snapshot_bytes: non_neg_integer(),
          leftovers: [Path.t()]
        }

  @spec log_path(Path.t(), pos_integer()) :: Path.t()
  def log_path(directory, generation), do: Path.join(directory, "log.#{generation}")

  defp snapshot_path(directory, generation), do: Path.join(directory, "snapshot.#{generation}")

  @doc "Makes the image what the directory holds. Changes no file. `cut`: where the newest log's sound part ends."
  @spec recover(Path.t(), Tables.t()) :: {:ok, found()} | {:error, Error.t()}
  def recover(directory, tables) do
    # For all of its files: there may be many.
    into = {tables, Atoms.budget()}

    with {:ok, files} <- listed(directory),
         {:ok, plan} <- plan(directory, files),
         :ok <- load_snapshot(directory, plan.snapshot, into),
         {:ok, generation, cut} <- load_logs(directory, plan.logs, into) do
      bytes = if plan.snapshot, do: File.stat!(snapshot_path(directory, plan.snapshot)).size, else: 0
      unused = for log <- plan.logs, log > generation, do: log_path(directory, log)
      {:ok, %{generation: generation, cut: cut, snapshot_bytes: bytes, leftovers: plan.leftovers ++ unused}}
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
          file =~ ~r/\A\.(log|snapshot|owner|secrets).*\.[0-9a-f]{16}\z/,
          do: Path.join(directory, file)

    strange = for file <- files, number(file) == nil, file not in @own, not String.starts_with?(file, "."), do: file

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

  defp load_snapshot(_directory, nil, _into), do: :ok

  defp load_snapshot(directory, generation, {tables, budget}) do
    path = snapshot_path(directory, generation)

    load = fn
      _term, :complete -> {:error, "it comes after the end"}
      :complete, :reading -> {:ok, :complete}
      facts, :reading -> with(:ok <- Tables.load(tables, facts), do: {:ok, :reading})
    end

    case Log.fold(path, :snapshot, generation, budget, :reading, load) do
      {:ok, :complete, :whole} -> :ok
      # It had its name when all of it was on disk.
      {:ok, _state, _torn} -> damaged(path, "its end is missing")
      {:error, reason} -> damaged(path, reason)
    end
  end

  # Which log is the last, and where its sound part ends. A log that has a successor says so at its end (`{:next, n}`),
  # so that one that is missing is missed.
  defp load_logs(_directory, [], _into), do: {:ok, 1, :new}

  defp load_logs(directory, [generation | later], into) do
    path = log_path(directory, generation)
    next = generation + 1

    case {load_log(directory, generation, into), later} do
      {{:error, reason}, _later} -> damaged(path, reason)
      {{:ok, {:next, ^next}, :whole}, []} -> damaged(log_path(directory, next), "it is missing")
      {{:ok, {:next, ^next}, :whole}, later} -> load_logs(directory, later, into)
      {{:ok, :last, :whole}, []} -> {:ok, generation, nil}
      {{:ok, :last, {:torn, at}}, []} -> {:ok, generation, at}
      {{:ok, :last, ending}, [^next]} -> not_begun(directory, generation, ending, into)
      {_other, _later} -> damaged(path, "its end is missing")
    end
  end

  defp load_log(directory, generation, {tables, budget}) do
    Log.fold(log_path(directory, generation), :log, generation, budget, :last, fn
      _term, {:next, _n} -> {:error, "it comes after the end"}
      {:next, n}, :last -> {:ok, {:next, n}}
      facts, :last -> with(:ok <- Tables.load(tables, facts), do: {:ok, :last})
    end)
  end

  # The host died between making the next log and saying so in this one: nothing can be in that yet.
  defp not_begun(directory, generation, ending, {_tables, budget}) do
    path = log_path(directory, generation + 1)

    case Log.fold(path, :log, generation + 1, budget, 0, fn _term, count -> {:ok, count + 1} end) do
      {:ok, 0, :whole} -> {:ok, generation, with({:torn, at} <- ending, do: at, else: (:whole -> nil))}
      {:ok, _some, _ending} -> damaged(log_path(directory, generation), "its end is missing")
      {:error, reason} -> damaged(path, reason)
    end
  end

  defp damaged(path, reason), do: Error.error(:store_damaged, "the store cannot be read: #{path}: #{reason}")

  @doc "Makes the snapshot of that number, and removes what it replaces; its size. Raises if it cannot."
  @spec make!(Path.t(), pos_integer(), pos_integer()) :: pos_integer()
  def make!(directory, generation, versions) do
    tables = Tables.new(versions: versions)
    {:ok, files} = File.ls(directory)
    {:ok, plan} = plan(directory, files)
    into = {tables, Atoms.budget()}
    :ok = load_snapshot(directory, plan.snapshot, into)
    # The log of that number is being written: nothing is read of it.
    done = Enum.reject(plan.logs, &(&1 == generation))
    for log <- done, do: {:ok, {:next, _n}, :whole} = load_log(directory, log, into)

    path = snapshot_path(directory, generation)
    :ok = write(path, generation, tables)
    Tables.delete(tables)
    for log <- done, do: File.rm!(log_path(directory, log))
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
