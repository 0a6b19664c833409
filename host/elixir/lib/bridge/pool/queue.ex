defmodule Bridge.Pool.Queue do
  @moduledoc false
  # Who waits for a kernel, and in which order: a bounded queue that is fair between sessions. A value: no process, no
  # clock.
  #
  # One queue a session, served in turn: first in, first out within a session, round-robin between them. At most `bound`
  # items wait. A session may wait with at most as many as there are free places left, so one that floods takes half of
  # them and the next still finds room. Each item is in the queue once. Everything takes logarithmic time.

  @enforce_keys [:bound]
  defstruct [:bound, next: 0, turns: :gb_trees.empty(), sessions: %{}, items: %{}]

  @type item :: term()
  @type t :: %__MODULE__{
          bound: non_neg_integer(),
          next: non_neg_integer(),
          turns: :gb_trees.tree(non_neg_integer(), String.t()),
          sessions: %{String.t() => {non_neg_integer(), :gb_trees.tree(non_neg_integer(), item())}},
          items: %{item() => {String.t(), non_neg_integer()}}
        }

  @spec new(non_neg_integer()) :: t()
  def new(bound), do: %__MODULE__{bound: bound}

  @spec length(t()) :: non_neg_integer()
  def length(queue), do: map_size(queue.items)

  @doc "How many of that session's wait."
  @spec waiting(t(), String.t()) :: non_neg_integer()
  def waiting(queue, session) do
    case queue.sessions do
      %{^session => {_turn, line}} -> :gb_trees.size(line)
      _ -> 0
    end
  end

  @doc "Wait in line, behind the session's own; `:full` if it has as many waiting as there are free places left."
  @spec put(t(), String.t(), item()) :: {:ok, t()} | :full
  def put(%{next: next} = queue, session, item) do
    if waiting(queue, session) >= queue.bound - __MODULE__.length(queue) do
      :full
    else
      {turn, line, turns} =
        case queue.sessions do
          %{^session => {turn, line}} -> {turn, line, queue.turns}
          _ -> {next, :gb_trees.empty(), :gb_trees.insert(next, session, queue.turns)}
        end

      {:ok,
       %{
         queue
         | next: next + 1,
           turns: turns,
           sessions: Map.put(queue.sessions, session, {turn, :gb_trees.insert(next, item, line)}),
           items: Map.put_new(queue.items, item, {session, next})
       }}
    end
  end

  @doc "The next one, of the session whose turn it is; `:empty` if nobody waits."
  @spec pop(t()) :: {item(), t()} | :empty
  def pop(queue) do
    if :gb_trees.is_empty(queue.turns) do
      :empty
    else
      {turn, session, turns} = :gb_trees.take_smallest(queue.turns)
      {^turn, line} = Map.fetch!(queue.sessions, session)
      {_number, item, line} = :gb_trees.take_smallest(line)
      queue = %{queue | items: Map.delete(queue.items, item)}

      if :gb_trees.is_empty(line) do
        {item, %{queue | turns: turns, sessions: Map.delete(queue.sessions, session)}}
      else
        turns = :gb_trees.insert(queue.next, session, turns)
        sessions = Map.put(queue.sessions, session, {queue.next, line})
        {item, %{queue | next: queue.next + 1, turns: turns, sessions: sessions}}
      end
    end
  end

  @doc "Take one out of the line; does nothing if it is not in it."
  @spec remove(t(), item()) :: t()
  def remove(queue, item) do
    case Map.pop(queue.items, item) do
      {nil, _items} ->
        queue

      {{session, number}, items} ->
        {turn, line} = Map.fetch!(queue.sessions, session)
        line = :gb_trees.delete(number, line)

        if :gb_trees.is_empty(line) do
          turns = :gb_trees.delete(turn, queue.turns)
          %{queue | items: items, turns: turns, sessions: Map.delete(queue.sessions, session)}
        else
          %{queue | items: items, sessions: Map.put(queue.sessions, session, {turn, line})}
        end
    end
  end
end
